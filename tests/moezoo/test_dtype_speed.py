"""What a dtype is worth: measured once, kept on the disk, and read again."""

import json

import pytest
import torch

from moezoo import dtype_speed
from moezoo.dtype_speed import Speeds
from moezoo_kernels import product_libraries


def figures(bf16: float) -> Speeds:
    return Speeds({torch.float32: 100.0, torch.bfloat16: bf16, torch.float16: 50.0})


@pytest.fixture
def measured(monkeypatch, tmp_path, real_dtype_speed):
    """Count measurements, and keep their figures in a folder of the test."""
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(
        dtype_speed, "measure", lambda: calls.append(1) or figures(100.0 * len(calls))
    )

    def ask() -> Speeds:
        real_dtype_speed.cache_clear()  # as in another process
        return real_dtype_speed()

    yield ask, calls, tmp_path / "cache" / "dtype_speed.json"
    real_dtype_speed.cache_clear()


def test_measured_once_per_machine(measured):
    ask, calls, file = measured
    first = ask()
    assert first == ask() == figures(100.0)
    assert len(calls) == 1
    (figure,) = json.loads(file.read_text()).values()
    assert figure["gflops"] == {"float32": 100.0, "bfloat16": 100.0, "float16": 50.0}


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "default")],
)
def test_other_instructions_are_measured_apart(measured, monkeypatch, variable, value):
    ask, calls, file = measured
    monkeypatch.delenv(variable, raising=False)
    ask()
    monkeypatch.setenv(variable, value)
    ask()
    assert len(calls) == 2
    monkeypatch.delenv(variable)
    assert ask() == figures(100.0)
    assert len(calls) == 2
    assert len(json.loads(file.read_text())) == 2


def test_libraries_are_measured_apart(measured, monkeypatch):
    ask, calls, file = measured
    for name in ("onednn", "torch", "onednn", "torch"):
        monkeypatch.setattr(product_libraries, "chosen", lambda name=name: name)
        ask()
    assert len(calls) == 2
    assert [
        f"fp32 by {name}" in key
        for key, name in zip(json.loads(file.read_text()), ("onednn", "torch"), strict=True)
    ] == [True, True]


def test_fp32_is_measured_with_the_library_that_is_used(monkeypatch):
    if not product_libraries.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    products, run = [], product_libraries.onednn_linear
    monkeypatch.setattr(
        product_libraries, "onednn_linear", lambda *parts: products.append(1) or run(*parts)
    )
    for faster in (True, False):
        monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda f=faster: f)
        dtype_speed.measure()
        assert bool(products) is faster
        products.clear()


def test_other_threads_are_measured_apart(measured):
    ask, calls, _ = measured
    threads = torch.get_num_threads()
    ask()
    try:
        torch.set_num_threads(threads + 1)
        ask()
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff", "null", '{"a": 1}'])
def test_a_damaged_file_is_replaced(measured, content):
    ask, calls, file = measured
    file.parent.mkdir()
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert ask() == ask() == figures(100.0)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"gflops": {}},
        {"gflops": [1, 2, 3]},
        {"gflops": {"float32": 0, "bfloat16": 1, "float16": 1}},
        {"gflops": {"float32": 1, "bfloat16": 1, "float16": float("nan")}},
        {"gflops": {"float32": "x", "bfloat16": 1, "float16": 1}},
    ],
)
def test_a_damaged_entry_is_replaced_and_others_stay(measured, entry):
    ask, calls, file = measured
    ask()
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: entry, "another machine": 7}))
    assert ask() == ask() == figures(200.0)
    assert len(calls) == 2
    assert json.loads(file.read_text())["another machine"] == 7


def test_a_folder_that_cannot_be_written_is_no_failure(measured, monkeypatch, tmp_path):
    ask, calls, _ = measured
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "file"))
    assert ask() == figures(100.0)
    assert ask() == figures(200.0)
    assert len(calls) == 2


def test_measuring_is_harmless():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():
        found = dtype_speed.measure()
    assert set(found.products) == set(dtype_speed.DTYPES)
    assert all(0 < value < 1e6 for value in found.products.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_figures_of_before_are_read(measured):
    ask, calls, file = measured
    ask()
    (key,) = json.loads(file.read_text())
    gflops = {"float32": 100.0, "bfloat16": 300.0, "float16": 50.0}
    file.write_text(json.dumps({key: {"gflops": gflops, "bf16_mixed_training": 1.5}}))
    assert ask() == figures(300.0)
    assert len(calls) == 1


def test_cpus_train_in_fp32_without_measuring(monkeypatch):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    assert dtype_speed.training_precision("cpu") == "32-true"


@pytest.mark.parametrize(
    ("bf16", "chosen"), [(3.0, "float32"), (300.0, "float32"), (500.0, "bfloat16")]
)
def test_muon_follows_the_measured_products(monkeypatch, bf16, chosen):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: figures(bf16))
    assert dtype_speed.muon_dtype("cpu") == chosen
    assert dtype_speed.muon_dtype("cuda") == "bfloat16"


def test_processes_that_could_measure_differently_take_fp32(monkeypatch):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dtype_speed.training_precision("cpu") == "32-true"
    assert dtype_speed.muon_dtype("cpu") == "float32"


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_gpus_compute_in_bf16_if_they_have_it(monkeypatch, supported, chosen):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert dtype_speed.training_precision("cuda") == chosen
    assert dtype_speed.training_precision("mps") == "32-true"
    assert dtype_speed.cost_of_training("bf16-mixed", "cuda") is None


@pytest.mark.parametrize(
    ("precision", "speeds", "line"),
    [
        (
            "bf16-mixed",
            figures(25.0),
            "in bf16-mixed, products take about 4× as long as in 32-true",
        ),
        ("bf16-true", figures(3.0), "in bf16-true, products take about 30× as long as in 32-true"),
        ("bf16-mixed", figures(70.0), None),
        ("bf16-true", figures(300.0), None),
        ("32-true", figures(3.0), None),
    ],
)
def test_what_a_precision_costs_is_one_line(monkeypatch, precision, speeds, line):
    monkeypatch.setattr(dtype_speed, "speeds", lambda: speeds)
    found = dtype_speed.cost_of_training(precision, "cpu")
    assert found is None if line is None else found.startswith(line)


def test_slowdown_is_of_products_against_fp32():
    assert figures(25.0).slowdown(torch.bfloat16) == 4.0
    assert figures(400.0).slowdown(torch.bfloat16) == 1.0
    assert figures(25.0).slowdown(torch.float64) == 1.0


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_a_measurement_reads_no_default_of_the_caller(monkeypatch, default):
    seen = []
    monkeypatch.setattr(
        dtype_speed, "_seconds", lambda work, *_: seen.append(torch.is_autocast_enabled("cpu")) or 1
    )
    made = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: made.append(randn(*a, **k)) or made[-1])
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            found = dtype_speed.measure()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == Speeds(dict.fromkeys(dtype_speed.DTYPES, found.products[torch.float32]))
    assert not any(seen)
    assert {(tensor.dtype, tensor.device.type) for tensor in made} == {(torch.float32, "cpu")}


def test_a_precision_that_costs_nothing_is_not_measured(monkeypatch):
    def never() -> Speeds:
        raise AssertionError("measured")

    monkeypatch.setattr(dtype_speed, "speeds", never)
    assert dtype_speed.cost_of_training("32-true", "cpu") is None
