"""Timing several contenders so that a busy machine treats them alike: A B C A B C …"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from moezoo.bench.limits import wait

_SHORTEST = 2e-3  # seconds: a sample is that long, so that the clock's own cost does not count
_FEWEST = 3
_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


@dataclass(frozen=True)
class Timing:
    """How long one call took.

    Attributes:
        seconds: of each sample, per call.
        repeats: calls in a sample.
    """

    seconds: tuple[float, ...]
    repeats: int = 1

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    runs: int,
    budget: float,
    always: str,
) -> dict[str, Timing]:
    """Time every call ``runs`` times, in turn, after calling each once.

    A call that would take longer than ``budget`` seconds in all gets fewer samples, no fewer than
    three, spread evenly over the rounds. Results are dropped before the next call begins, so that
    everyone pays for fresh memory alike.

    Args:
        calls: by name.
        device: where they run. On CUDA, events are used and the cache is flushed before each call.
        runs: samples per call.
        budget: seconds per call.
        always: the call that gets all samples, however slow it is.
    """
    sample = _cuda_sampler(device) if device.type == "cuda" else _sample_cpu
    first = {name: sample(call, 1) for name, call in calls.items()}
    repeats = {
        name: 1 if device.type == "cuda" else max(1, math.ceil(_SHORTEST / max(seconds, 1e-9)))
        for name, seconds in first.items()
    }
    counts = {
        name: runs
        if name == always
        else min(runs, max(_FEWEST, int(budget / max(first[name] * repeats[name], 1e-9))))
        for name in calls
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for round_ in range(runs):
            for name, call in calls.items():
                if _takes_part(round_, counts[name], runs):
                    samples[name].append(sample(call, repeats[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(samples[name]), repeats[name]) for name in calls}


def _takes_part(round_: int, count: int, runs: int) -> bool:
    """Spread ``count`` samples evenly over ``runs`` rounds."""
    return (round_ + 1) * count // runs > round_ * count // runs


def _sample_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_sampler(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(call: Callable[[], object], repeats: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        wait(device)
        return float(start.elapsed_time(end)) / 1e3 / repeats

    return sample
