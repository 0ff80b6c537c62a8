"""Which library multiplies fp32 matrices fastest on this CPU: measured once per machine.

torch's own products go to MKL, which takes its AVX2 kernels on processors that are not Intel's.
oneDNN, in the same wheel, takes AVX-512 wherever there is any, and so does ``csrc/matmul.h``: twice
the rate on an AMD EPYC, about the same elsewhere. A processor's name says neither, so a product of
middle size is timed by all three, in a few milliseconds, and the rates are kept in
``product_rates.json`` in ``$MOEZOO_CACHE`` (default: ``~/.cache/moezoo``). So each process of a
machine chooses alike, and a resumed run has the same bits.

``MOEZOO_PRODUCTS`` answers instead: ``torch`` leaves all products to torch, ``own`` takes ours for
experts and factors, ``fastest`` is the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moezoo_kernels import machine_figures, matmul, native

VARIABLE = "MOEZOO_PRODUCTS"
CHOICES = ("fastest", "own", "torch")
FASTER = 1.15
"""How many times as fast as torch's own products another library has to be to get them."""

# What a call for all experts saves beside the products is worth 1.1 to 1.4 times at equal ones.
_KEEPS_UP = 0.85
_SIZE = (128, 256, 256)  # rows for each thread, depth, columns: an expert's of a small model
_ROUNDS = 9

_known: dict[int, Rates] = {}  # by number of threads


class Rates(NamedTuple):
    """GFLOP/s of one product in fp32, by library; 0 for one that is not there."""

    torch: float
    onednn: float
    own: float


def own_is_faster() -> bool:
    """Return whether our fp32 products of matrices are clearly faster than torch's on this CPU.

    Raises:
        ValueError: ``MOEZOO_PRODUCTS`` is no choice, or own where there is no C++ library.
    """
    return _own(FASTER)


def own_keeps_up() -> bool:
    """Return whether ours are as fast, up to what a single call saves where there are many.

    Raises:
        ValueError: as :func:`own_is_faster`.
    """
    return _own(_KEEPS_UP)


def onednn_is_faster() -> bool:
    """Return whether oneDNN's fp32 products are clearly faster than torch's on this CPU.

    Raises:
        ValueError: ``MOEZOO_PRODUCTS`` is no choice.
    """
    if wanted() == "torch" or not has_onednn():
        return False
    found = rates()
    return found.onednn >= FASTER * found.torch


# As `_choose` of backends.py: a compiler takes what is found for a constant.
for _answer in (own_is_faster, own_keeps_up, onednn_is_faster):
    _answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _own(least: float) -> bool:
    choice, missing = wanted(), native.unusable(torch.device("cpu"), torch.float32)
    if choice == "own" and missing is not None:
        raise ValueError(f"{VARIABLE}=own: C++ kernels are {missing}")
    if choice != "fastest" or missing is not None:
        return choice == "own"
    found = rates()
    return found.own >= least * found.torch


def wanted() -> str:
    """Return what ``MOEZOO_PRODUCTS`` says; ``fastest``, if nothing.

    Raises:
        ValueError: it is no choice.
    """
    return checked(os.environ.get(VARIABLE) or CHOICES[0])


def checked(value: str) -> str:
    """Return a value of ``MOEZOO_PRODUCTS``.

    Raises:
        ValueError: there is no such choice.
    """
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE}: no choice '{value}'; choose from: {', '.join(CHOICES)}")
    return value


def chosen() -> str:
    """Name the library that gets large linear maps in fp32 on the CPU: ``onednn`` or ``torch``."""
    return "onednn" if onednn_is_faster() else "torch"


def rates() -> Rates:
    """Return the rates for the current number of threads: those kept, or measured now."""
    threads = torch.get_num_threads()
    if threads not in _known:
        _known[threads] = _kept_or_measured(threads)
    return _known[threads]


def has_onednn() -> bool:
    """Return whether this build of torch has the product by oneDNN that is used here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + b`` by oneDNN, without gradients.

    A weight with gaps between its rows or columns, such as some of another's columns, is copied:
    oneDNN would multiply it by a plain loop, a thousand times slower.

    Args:
        x: ``(R, I)`` fp32, any strides.
        weight: ``(O, I)`` fp32, any strides.
        bias: ``(O,)`` fp32, contiguous.

    Returns:
        ``(R, O)``, contiguous.
    """
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _kept_or_measured(threads: int) -> Rates:
    key = machine_figures.key(threads, f"kernels {native.VERSION} {native.loaded_name()}")
    if (found := _parse(machine_figures.kept("product_rates", key))) is not None:
        return found
    measured = _measure(threads)
    machine_figures.keep("product_rates", key, measured._asdict())
    return measured


def _parse(figures: object) -> Rates | None:
    """Read one machine's rates; None if anything is missing or no sensible number."""
    if not isinstance(figures, dict):
        return None
    try:
        found = Rates(**{name: float(figures[name]) for name in Rates._fields})
    except (KeyError, TypeError, ValueError):
        return None
    sensible = all(0 <= rate < float("inf") for rate in found)
    return found if sensible and found.torch > 0 else None


def _measure(threads: int) -> Rates:
    """Time a product by each library that is there."""
    rows, depth, columns = _SIZE[0] * threads, *_SIZE[1:]
    # What the caller counts, records or casts are its own products, not these.
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        x = torch.full((rows, depth), 0.5, dtype=torch.float32)
        weight = torch.full((columns, depth), 0.25, dtype=torch.float32)
        out = torch.empty(rows, columns, dtype=torch.float32)
        work: dict[str, Callable[[], object]] = {
            "torch": lambda: torch.mm(x, weight.t(), out=out),
        }
        if has_onednn():
            work["onednn"] = lambda: onednn_linear(x, weight)
        if native.unusable(torch.device("cpu"), torch.float32) is None:
            work["own"] = lambda: matmul.matmul(x, weight.t(), out=out)
        seconds = dict(zip(work, fastest(*work.values()), strict=True))
    flops = 2 * rows * depth * columns
    found = {name: flops / taken / 1e9 for name, taken in seconds.items()}
    return Rates(**{name: found.get(name, 0.0) for name in Rates._fields})


def fastest(*functions: Callable[[], object], rounds: int = _ROUNDS) -> list[float]:
    """Return the least seconds that each function took, called in turn after a first call of each.

    What else a machine does makes calls slower, never faster: the least is what they take.
    """
    least = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            begin = perf_counter()
            function()
            if turn:
                least[i] = min(least[i], max(perf_counter() - begin, 1e-9))
    return least
