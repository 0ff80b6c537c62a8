"""The choice between our products of matrices and torch's: measured, or told."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moezoo_kernels import native, product_libraries
from moezoo_kernels.product_libraries import own_is_faster, own_keeps_up


@pytest.fixture(autouse=True)
def _measure_anew(monkeypatch):
    monkeypatch.delenv("MOEZOO_PRODUCTS", raising=False)
    product_libraries._speed.cache_clear()
    yield
    product_libraries._speed.cache_clear()


def _pretend(monkeypatch, ours, others):
    """Let the clock find these seconds instead of what calls take."""
    found = []

    def fastest(*functions):
        for function in functions:
            function()
        found.append(len(functions))
        return [ours, others]

    monkeypatch.setattr(product_libraries, "fastest", fastest)
    return found


@pytest.mark.parametrize(
    ("ratio", "faster", "keeps_up"),
    [
        (2.0, True, True),
        (1.25, True, True),
        (1.1, False, True),
        (0.85, False, True),
        (0.8, False, False),
    ],
)
def test_what_is_measured_decides_once_for_a_number_of_threads(
    native_library, monkeypatch, ratio, faster, keeps_up
):
    measured = _pretend(monkeypatch, 1.0, ratio)
    for _ in range(2):
        assert (own_is_faster(), own_keeps_up()) == (faster, keeps_up)
    assert measured == [2]


def test_measuring_is_not_counted_nor_cast(native_library):
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        own_is_faster()
    assert counter.get_total_flops() == 0
    assert product_libraries._speed.cache_info().misses == 1


@pytest.mark.parametrize("wanted", ["own", "torch"])
def test_the_variable_decides_without_measuring(native_library, monkeypatch, wanted):
    measured = _pretend(monkeypatch, 1.0, 1.0)
    monkeypatch.setenv("MOEZOO_PRODUCTS", wanted)
    assert own_is_faster() == own_keeps_up() == (wanted == "own")
    assert not measured


def test_an_unknown_choice_is_named_with_the_others(monkeypatch):
    monkeypatch.setenv("MOEZOO_PRODUCTS", "mkl")
    with pytest.raises(
        ValueError, match=r"^MOEZOO_PRODUCTS: 'mkl' is not known; choose from: own, torch$"
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
