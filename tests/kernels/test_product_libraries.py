"""The choice between our products of matrices and torch's: measured, or told."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moezoo.cache_folder import cache_folder
from moezoo_kernels import machine_figures, native, product_libraries
from moezoo_kernels.product_libraries import onednn_is_faster, own_is_faster, own_keeps_up


@pytest.fixture(autouse=True)
def _measure_anew(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEZOO_PRODUCTS", raising=False)
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(product_libraries, "_known", {})


def _pretend(monkeypatch, **seconds):
    """Replace what calls take by these seconds, one otherwise."""
    found = []

    def fastest(*functions):
        for function in functions:
            function()
        found.append(len(functions))
        names = ("torch", "onednn", "own") if product_libraries.has_onednn() else ("torch", "own")
        return [seconds.get(name, 1.0) for name in names[: len(functions)]]

    monkeypatch.setattr(product_libraries, "fastest", fastest)
    return found


@pytest.mark.parametrize(
    ("ratio", "faster", "keeps_up"),
    [
        (2.0, True, True),
        (1.15, True, True),
        (1.1, False, True),
        (0.85, False, True),
        (0.8, False, False),
    ],
)
def test_what_is_measured_decides_once_for_a_number_of_threads(
    native_library, monkeypatch, ratio, faster, keeps_up
):
    measured = _pretend(monkeypatch, torch=ratio)
    for _ in range(2):
        assert (own_is_faster(), own_keeps_up()) == (faster, keeps_up)
    assert len(measured) == 1


def test_measuring_is_not_counted_nor_cast(native_library):
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        own_is_faster()
    assert counter.get_total_flops() == 0
    assert list(product_libraries._known) == [torch.get_num_threads()]


@pytest.mark.parametrize("wanted", ["own", "torch"])
def test_the_variable_decides_without_measuring(native_library, monkeypatch, wanted):
    measured = _pretend(monkeypatch)
    monkeypatch.setenv("MOEZOO_PRODUCTS", wanted)
    assert own_is_faster() == own_keeps_up() == (wanted == "own")
    assert not measured


def test_an_unknown_choice_is_named_with_the_others(monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "mkl")
    with pytest.raises(
        ValueError, match=r"^MOEZOO_PRODUCTS: no choice 'mkl'; choose from: fastest, own, torch$"
    ):
        own_is_faster()


def test_without_a_library_torch_multiplies(monkeypatch):
    monkeypatch.setenv("MOEZOO_NATIVE", "off")
    native.load.cache_clear()
    try:
        assert not own_is_faster()
        monkeypatch.setenv("MOEZOO_PRODUCTS", "own")
        with pytest.raises(
            ValueError, match=r"^MOEZOO_PRODUCTS=own: C\+\+ kernels are switched off by"
        ):
            own_is_faster()
    finally:
        native.load.cache_clear()


def test_a_compiler_takes_the_answer_for_a_constant(native_library):
    def double(x):
        return 2 * x if own_keeps_up() else x + x

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(("ratio", "faster"), [(1.1, False), (1.15, True), (2.2, True)])
def test_onednn_gets_products_where_it_is_clearly_faster(monkeypatch, ratio, faster):
    monkeypatch.setattr(product_libraries, "has_onednn", lambda: True)
    monkeypatch.setattr(product_libraries, "onednn_linear", lambda x, weight: x @ weight.T)
    _pretend(monkeypatch, torch=ratio)
    assert onednn_is_faster() == faster
    monkeypatch.setenv("MOEZOO_PRODUCTS", "torch")
    assert not onednn_is_faster()


def test_a_later_process_takes_what_was_measured(native_library, monkeypatch):
    measured = _pretend(monkeypatch, torch=2.0)
    first = product_libraries.rates()
    monkeypatch.setattr(product_libraries, "_known", {})
    _pretend(monkeypatch, torch=0.5)  # a clock that would decide otherwise
    assert product_libraries.rates() == first
    assert len(measured) == 1


@pytest.mark.parametrize(
    "figures", ["[]", '{"torch": 1}', '{"torch": 0, "onednn": 1, "own": 1}', "{"]
)
def test_figures_that_make_no_sense_are_measured_again(
    native_library, monkeypatch, tmp_path, figures
):
    measured = _pretend(monkeypatch, torch=2.0)
    monkeypatch.setattr(machine_figures, "key", lambda *_: "this machine")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "product_rates.json").write_text(f'{{"this machine": {figures}}}')
    assert own_is_faster()
    assert len(measured) == 1
    monkeypatch.setattr(product_libraries, "_known", {})
    assert own_is_faster()
    assert len(measured) == 1


@pytest.mark.parametrize("variable", ["MOEZOO_CACHE", "XDG_CACHE_HOME"])
def test_rates_are_kept_in_the_folder_of_all_that_is_kept(
    native_library, monkeypatch, tmp_path, variable
):
    monkeypatch.delenv("MOEZOO_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    product_libraries.rates()
    assert [path.name for path in cache_folder().iterdir()] == ["product_rates.json"]


def test_threads_and_libraries_have_rates_of_their_own(native_library, monkeypatch):
    measured = _pretend(monkeypatch)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            product_libraries.rates()
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    monkeypatch.setattr(product_libraries, "_known", {})
    product_libraries.rates()
    assert len(measured) == 3


def test_without_onednn_it_gets_nothing(monkeypatch):
    monkeypatch.setattr(product_libraries, "has_onednn", lambda: False)
    assert product_libraries.rates().onednn == 0
    assert not onednn_is_faster()


def test_rates_are_those_of_products():
    found = product_libraries._measure(torch.get_num_threads())
    assert found.torch > 0
    assert (found.onednn > 0) == product_libraries.has_onednn()


def test_importing_measures_nothing():
    code = "from moezoo_kernels import linear, product_libraries as p; print(len(p._known))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, check=True, capture_output=True, text=True
    ).stdout
    assert printed.strip() == "0"


class _Weights(TorchDispatchMode):
    """Keep the weights that oneDNN's product is called with."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 40), slice(0, 48, 2)])
def test_onednn_gets_weights_without_gaps(columns, transposed):
    if not product_libraries.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(48, 48, generator=generator) for _ in range(2))
    weight, x = (m[:, columns].t() if transposed else m[:, columns] for m in (weight, x))
    with _Weights() as seen:
        made = product_libraries.onednn_linear(x, weight)
    (given,) = seen.found
    assert given.is_contiguous() or given.t().is_contiguous()
    exact = x.double() @ weight.double().t()
    assert (made - exact).abs().max() <= 1e-5 * exact.abs().max()
