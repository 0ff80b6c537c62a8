"""The C++ library: which one is loaded, and what is said when none is."""

import re
from pathlib import Path

import pytest
import torch

from moezoo_kernels import native

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _load_anew():
    native.load.cache_clear()
    native.warn_once.cache_clear()
    yield
    native.load.cache_clear()
    native.warn_once.cache_clear()


def test_sources_and_loader_have_the_same_version():
    source = (ROOT / "kernels" / "csrc" / "version.cpp").read_text(encoding="utf-8")
    assert f"return {native.VERSION};" in source


def test_dtype_codes_are_those_of_the_sources():
    source = (ROOT / "kernels" / "csrc" / "common.h").read_text(encoding="utf-8")
    codes = dict(re.findall(r"k(\w+) = (\d)", source))
    assert native.dtype_code(torch.float32) == int(codes["Float32"])
    assert native.dtype_code(torch.bfloat16) == int(codes["BFloat16"])


def test_every_library_that_runs_here_loads(native_library):
    library = native.load()
    assert isinstance(library, native.Library)
    assert library.name == native_library
    assert native.unusable(CPU, torch.float32) is None


def test_off_is_a_reason_and_nothing_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("MOEZOO_NATIVE", "off")
    assert native.unusable(CPU, torch.float32) == "switched off by MOEZOO_NATIVE=off"
    native.warn_once()
    assert not caplog.records
    with pytest.raises(RuntimeError, match="switched off"):
        native.function("moezoo_version")


def test_an_unknown_library_is_named_with_the_choices(monkeypatch):
    monkeypatch.setenv("MOEZOO_NATIVE", "neon")
    reason = native.unusable(CPU, torch.float32)
    assert reason is not None
    assert reason.startswith("MOEZOO_NATIVE=neon does not run here; choose from: ")


def test_without_a_library_one_line_says_so_once(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("MOEZOO_NATIVE", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.warn_once()
    native.warn_once()
    (record,) = caplog.records
    assert "not built: no C++ compiler" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "VERSION", -1)
    reason = native.unusable(CPU, torch.float32)
    assert reason is not None
    assert "other sources" in reason or "not built" in reason


def test_a_broken_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_native_generic.so").write_bytes(b"not a library")
    monkeypatch.setenv("MOEZOO_NATIVE", "generic")
    reason = native.unusable(CPU, torch.float32)
    assert reason is not None
    assert "cannot be loaded" in reason


def test_other_dtypes_and_devices_are_refused_with_a_reason():
    assert native.unusable(CPU, torch.float64) == "has fp32 and bf16, not float64"
    assert native.unusable(torch.device("meta"), torch.float32) == "needs a CPU device"
