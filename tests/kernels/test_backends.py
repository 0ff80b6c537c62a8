import contextlib

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import backends
from moezoo_kernels.grouped_mlp import grouped_mlp as from_package
from moezoo_kernels.grouped_mlp.reference import grouped_mlp as reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_forced_backend():
    with moezoo_kernels.use(None):
        yield


def _chosen(**options):
    function = backends.choose("grouped_mlp", CPU, torch.float32, **options)
    return function.keywords["backend"] if hasattr(function, "keywords") else "reference"


def test_the_op_is_a_function_although_its_package_has_the_same_name():
    assert moezoo_kernels.grouped_mlp is from_package
    assert callable(moezoo_kernels.grouped_mlp)
    assert moezoo_kernels.grouped_mlp is not reference


@pytest.fixture(scope="module")
def printed(run_each):
    """Return what processes print that import the ops: packages they bring, what is forced."""
    # torch's FLOP counter imports triton by itself.
    first = "import torch, torch.utils.flop_counter"
    loads = (
        "import sys; before = set(sys.modules);"
        "import moezoo_kernels; moezoo_kernels.backends.table();"
        "heavy = {'triton', 'triton.language', 'megablocks', 'scattermoe', 'transformers'};"
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    forced = (
        "import os, torch; os.environ['MOEZOO_BACKEND'] = '{}'\n"
        "import moezoo_kernels as m\n"
        "try: m.grouped_mlp(torch.ones(2, 4), torch.ones(1, 6, 4), torch.ones(1, 4, 3),"
        " torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))\n"
        "except ValueError as error: print(error)\n"
        "else: print(m.backends.forced())"
    )
    codes = {"loads": loads, **{name: forced.format(name) for name in ("reference", "tritn")}}
    return dict(zip(codes, run_each(first, list(codes.values())), strict=True))


def test_importing_the_ops_loads_no_backend_package(printed):
    assert printed["loads"] == "[]\n"


def test_cpu_chooses_its_own_backend_and_takes_an_op_s_preference():
    assert _chosen() == "cpu"
    assert _chosen(prefer="grouped_mm") == "grouped_mm"
    assert _chosen(prefer="megablocks") == "cpu"


def test_use_holds_until_changed_and_wins_over_the_preference():
    moezoo_kernels.use("reference")
    assert _chosen(prefer="grouped_mm") == "reference"
    moezoo_kernels.use(None)
    assert _chosen() == "cpu"


def test_use_as_a_context_nests_and_restores_after_an_error():
    with moezoo_kernels.use("reference"):
        with contextlib.suppress(RuntimeError), moezoo_kernels.use("grouped_mm"):
            assert _chosen() == "grouped_mm"
            raise RuntimeError
        assert _chosen() == "reference"
    assert backends.forced() is None


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no backend 'tritn'; choose from: cpu, grouped_mm, "):
        moezoo_kernels.use("tritn")
    assert backends.forced() is None


@pytest.mark.parametrize("name", ["megablocks", "scattermoe"])
def test_forcing_a_backend_that_can_not_run_says_why(name):
    with moezoo_kernels.use(name), pytest.raises(ValueError) as caught:
        _chosen()
    expected = f"backend '{name}' cannot run grouped_mlp on cpu in float32: needs a CUDA device"
    assert str(caught.value) == expected


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    usable = backends._BACKENDS["grouped_mlp"]["megablocks"].usable
    reason = usable(torch.device("cuda"), torch.bfloat16)
    assert reason == "not installed; pip install --no-deps --no-build-isolation megablocks"


def test_an_old_gpu_is_told_what_grouped_mm_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    usable = backends._BACKENDS["grouped_mlp"]["grouped_mm"].usable
    reason = usable(torch.device("cuda"), torch.bfloat16)
    assert reason == "needs compute capability 8.0, this device has 7.5"


def test_the_environment_variable_forces_a_backend(printed):
    assert printed["reference"] == "reference\n"
    assert "no backend 'tritn'" in printed["tritn"]


def test_the_table_has_a_row_for_every_backend_and_one_default_per_device():
    rows = [row for row in backends.table() if row.op == "grouped_mlp" and row.device == "cpu"]
    assert [row.backend for row in rows] == [
        "cpu",
        "grouped_mm",
        "reference",
        "triton",
        "megablocks",
        "scattermoe",
    ]
    assert [row.usable for row in rows] == [True, True, True, False, False, False]
    assert all(row.usable == (row.reason == "") for row in rows)
    assert [row.backend for row in rows if row.default] == ["cpu"]
