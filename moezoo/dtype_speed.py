"""What a dtype is worth on this CPU: measured once per machine, and remembered.

Flags do not tell: without instructions for bf16, a CPU multiplies it 15 to 50 times slower than
fp32. So products of matrices are timed, in a fraction of a second. The figures are kept in
``dtype_speed.json`` in ``$MOEZOO_CACHE`` (default: ``~/.cache/moezoo``) under the CPU's name,
torch's version, the number of threads, the library that multiplies in fp32, and the variables that
choose instructions. Accelerators are not measured: they compute in bf16.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moezoo_kernels import machine_figures, product_libraries
from moezoo_kernels.linear import multiply

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FASTER_FOR_MUON = 4.0
"""How many times as fast as fp32 bf16 has to be for Muon, which in fp32 needs half the products."""

SLOW = 1.5
"""How many times as long as in fp32 products take in a dtype in which nothing is loaded unasked;
a line says so where a run is to be in it."""

_REPETITIONS = 9
_LEAST = 3
_ENOUGH = 0.03
"""Seconds after which a measurement of enough repetitions ends."""


class Speeds(NamedTuple):
    """What was measured on the CPU.

    Attributes:
        products: GFLOP/s of matrix products, by dtype.
    """

    products: dict[torch.dtype, float]

    def slowdown(self, dtype: torch.dtype) -> float:
        """Return how many times longer than in fp32 products take; 1 if no longer, or unknown."""
        own = self.products.get(dtype)
        return max(1.0, self.products[torch.float32] / own) if own else 1.0


def training_precision(device: str) -> str:
    """Return what ``trainer.precision: auto`` stands for on ``cpu``, ``cuda`` or ``mps``.

    CPUs train in fp32. What bf16 saves there is a matter of the model, and no small step tells it:
    on an EPYC with AVX-512, runs in ``bf16-mixed`` take 0.6 (dense) to 0.9 (PEER) of the time, and
    a step, timed three times, 0.4 to 0.85.

    Args:
        device: kind of the device.
    """
    if device == "cuda":
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if own else "32-true"
    return "32-true"


def muon_dtype(device: str) -> str:
    """Return what ``muon_dtype: auto`` stands for on a kind of device."""
    if device != "cpu":
        return "bfloat16"
    if many_processes():
        return "float32"
    products = speeds().products
    fast = products[torch.bfloat16] >= FASTER_FOR_MUON * products[torch.float32]
    return "bfloat16" if fast else "float32"


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether products on this CPU take clearly longer in a dtype than in fp32."""
    return speeds().slowdown(dtype) >= SLOW


def cost_of_training(precision: str, device: str) -> str | None:
    """Return a line on products that are slow in a precision on a CPU; None where none are."""
    if device != "cpu" or precision not in ("bf16-mixed", "bf16-true"):
        return None
    if not is_slow(torch.bfloat16):
        return None
    times = ratio(speeds().slowdown(torch.bfloat16))
    return f"in {precision}, products take about {times} as long as in 32-true on this CPU"


def ratio(times: float) -> str:
    """Write a ratio as it is known: 1.3×, 4×, 30×."""
    if times < 1.95:
        return f"{times:.1f}×"
    return f"{round(times, -1 if times >= 20 else 0):.0f}×"


@cache
def speeds() -> Speeds:
    """Return the CPU's figures: those on the disk, or measured now, and then kept there."""
    key = machine_figures.key(torch.get_num_threads(), f"fp32 by {product_libraries.chosen()}")
    if (found := _parse(machine_figures.kept("dtype_speed", key))) is not None:
        return found
    measured = measure()
    figures = {"gflops": {_name(dtype): value for dtype, value in measured.products.items()}}
    machine_figures.keep("dtype_speed", key, figures)
    return measured


def measure() -> Speeds:
    """Time products of matrices in each dtype."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        return Speeds(_measure_products())


def _measure_products() -> dict[torch.dtype, float]:
    rows, width = 128, 256
    x = torch.randn(rows, width, dtype=torch.float32, device="cpu")
    weight = torch.randn(width, width, dtype=torch.float32, device="cpu")
    seconds = {}
    for dtype in DTYPES:
        a, b = x.to(dtype), weight.to(dtype)
        multiply(a, b)  # what the first product sets up
        seconds[dtype] = _seconds(lambda a=a, b=b: multiply(a, b))  # type: ignore[misc]
    flops = 2 * rows * width * width
    return {dtype: flops / taken / 1e9 for dtype, taken in seconds.items()}


def _seconds(work: Callable[[], Any]) -> float:
    """Return the shortest of some durations: a process that has to wait makes others longer."""
    times: list[float] = []
    while len(times) < _LEAST or (len(times) < _REPETITIONS and sum(times) < _ENOUGH):
        start = time.perf_counter()
        work()
        times.append(max(time.perf_counter() - start, 1e-9))
    return min(times)


def many_processes() -> bool:
    """Return whether this process is one of several that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _parse(figures: Any) -> Speeds | None:
    """Read one machine's figures; None if anything is missing or no sensible number."""
    try:
        products = {dtype: float(figures["gflops"][_name(dtype)]) for dtype in DTYPES}
    except (KeyError, TypeError, ValueError):
        return None
    if not all(math.isfinite(number) and number > 0 for number in products.values()):
        return None
    return Speeds(products)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
