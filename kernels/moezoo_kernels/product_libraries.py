"""Which library multiplies matrices faster on this processor, found by trying.

MKL keeps to AVX2 on other makers' processors: with AVX-512 they could do twice as much, and
``csrc/matmul.h`` does. Where MKL uses all there is, nothing is gained. A processor's name says
neither, so each number of threads is measured once per process, in a few milliseconds, at its first
product.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
from torch.utils._python_dispatch import _disable_current_modes

from moezoo_kernels import matmul, native

_CHOICES = ("own", "torch")
_GAIN = 1.25  # by which ours have to be faster; the ratio is about 2 or about 1
# What a call for all experts saves beside the products is worth 1.1 to 1.4 times at equal ones.
_LOSS = 0.85
_SIZE = (128, 256, 256)  # rows, depth, columns: an expert's of a small model
_ROUNDS = 9


def own_is_faster() -> bool:
    """Return whether our fp32 products of matrices are the faster ones on this CPU.

    ``MOEZOO_PRODUCTS`` (own, torch) answers instead of a measurement.

    Raises:
        ValueError: ``MOEZOO_PRODUCTS`` is neither, or own where there is no C++ library.
    """
    return _answer(_GAIN)


def own_keeps_up() -> bool:
    """Return whether ours are as fast, up to what a single call saves where there are many.

    Raises:
        ValueError: as :func:`own_is_faster`.
    """
    return _answer(_LOSS)


# As `_choose` of backends.py: a compiler takes what is found for a constant.
own_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]
own_keeps_up._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _answer(least: float) -> bool:
    wanted = os.environ.get("MOEZOO_PRODUCTS") or None
    if wanted not in (None, *_CHOICES):
        known = ", ".join(_CHOICES)
        raise ValueError(f"MOEZOO_PRODUCTS: '{wanted}' is not known; choose from: {known}")
    missing = native.unusable(torch.device("cpu"), torch.float32)
    if wanted == "own" and missing is not None:
        raise ValueError(f"MOEZOO_PRODUCTS=own: C++ kernels are {missing}")
    if wanted is not None or missing is not None:
        return wanted == "own"
    return _speed(torch.get_num_threads()) >= least


@cache
def _speed(threads: int) -> float:
    """Return how many times as fast ours are, with as many threads as torch has now."""
    rows, depth, columns = _SIZE
    # What the caller counts, records or casts are its own products, not these.
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad():
        a, b, out = (
            native.floats(rows, depth),
            native.floats(depth, columns),
            native.floats(rows, columns),
        )
        a.fill_(1.0)
        b.fill_(1.0)
        ours, others = fastest(
            lambda: matmul.matmul(a, b, out=out), lambda: torch.mm(a, b, out=out)
        )
    return others / ours


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
                least[i] = min(least[i], perf_counter() - begin)
    return least
