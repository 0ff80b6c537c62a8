"""The machine's limits, measured in the same run as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from moezoo.bench.case import Work

_RUNS = 5


@dataclass(frozen=True)
class Limits:
    """Rates that no contender can exceed for long.

    Attributes:
        read: bytes per second of a stream that is read. On CUDA, of a copy, both directions.
        write: bytes per second into fresh memory, whose pages the system must provide first; on
            CUDA, where the allocator keeps memory, as ``read``.
        matmul: FLOP/s of a square matrix product, by dtype.
    """

    read: float
    write: float
    matmul: dict[str, float]

    def seconds(self, work: Work, dtype: str) -> float:
        """Return the time below which the work cannot be done: by bandwidth, or by arithmetic."""
        moving = work.read / self.read + work.written / self.write
        return max(moving, work.flops / self.matmul[dtype])

    def best(self, other: Limits) -> Limits:
        """Return the better of two measurements: other programs only ever slow one down."""
        matmul = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return replace(
            self,
            read=max(self.read, other.read),
            write=max(self.write, other.write),
            matmul=matmul,
        )


def measure(device: torch.device, small: bool = False) -> Limits:
    """Measure the limits of a device with the current number of threads.

    Args:
        device: CPU or CUDA.
        small: use a few megabytes, which caches hold: for trying the benchmark out, not for truth.
    """
    dtypes = (torch.float32, torch.bfloat16)
    if device.type == "cuda":
        bandwidth = _copy_rate(device, small)
        sizes = 512 if small else 8192
        matmul = {_name(dtype): _matmul_rate(device, dtype, sizes) for dtype in dtypes}
        return Limits(bandwidth, bandwidth, matmul)
    sizes = 128 if small else 1024
    matmul = {_name(dtype): _matmul_rate(device, dtype, sizes) for dtype in dtypes}
    return Limits(_read_rate(small), _write_rate(small), matmul)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_rate(small: bool) -> float:
    data = torch.ones((1 << 20) if small else (1 << 26))
    return _best_rate(data.device, data.nbytes, data.sum)


def _write_rate(small: bool) -> float:
    count = (1 << 20) if small else (1 << 26)
    return _best_rate(torch.device("cpu"), 4 * count, lambda: torch.empty(count).fill_(1.0))


def _copy_rate(device: torch.device, small: bool) -> float:
    data = torch.ones((1 << 20) if small else (1 << 28), device=device)
    target = torch.empty_like(data)
    return _best_rate(device, 2 * data.nbytes, lambda: target.copy_(data))


def _matmul_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    left = torch.randn(n, n, device=device).to(dtype)
    right = torch.randn(n, n, device=device).to(dtype)
    return _best_rate(device, 2 * n**3, lambda: left @ right)


def _best_rate(device: torch.device, amount: float, call: Callable[[], Tensor]) -> float:
    call()
    seconds = []
    for _ in range(_RUNS):
        wait(device)
        start = time.perf_counter()
        result = call()
        wait(device)
        seconds.append(time.perf_counter() - start)
        del result
    return amount / median(seconds)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
