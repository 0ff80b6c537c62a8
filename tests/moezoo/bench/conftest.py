"""Results with made-up times, for what comes after measuring."""

import pytest
import torch

from moezoo.bench.case import Work
from moezoo.bench.cases import CASES
from moezoo.bench.limits import Limits
from moezoo.bench.runner import LIMIT, Measured, Result
from moezoo.bench.timing import Timing


@pytest.fixture
def where() -> dict:
    return {
        "device": "a processor",
        "threads": 2,
        "torch": "2.13.0",
        "moezoo": "0.1.0",
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
    }


@pytest.fixture
def limits() -> Limits:
    return Limits(read=5e9, write=1e9, matmul={"float32": 1e11, "bfloat16": 2e11})


def timing(milliseconds: float, samples: int = 10) -> Timing:
    return Timing(tuple(milliseconds / 1e3 * (1 + 0.01 * (i % 3 - 1)) for i in range(samples)))


@pytest.fixture
def results() -> list[Result]:
    """One result per CPU case and peer; times, memory and work differ from case to case."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for case in (case for case in CASES if case.device == "cpu"):
        setting = case.setting(False, None)
        draw = torch.rand(4, generator=generator).tolist()
        work = Work(10 ** (8 + 2.5 * draw[0]), 10 ** (7 + 1.5 * draw[1]), 1e6)
        work = (work, Work(3 * work.flops, 2 * work.read, 10 * work.written))
        ours = 3e3 * work[0].flops / 8e10 + 1e3 * work[0].read / 2e9
        for peer in [*case.peers, *([LIMIT] if case.limit else [])]:
            factor = 10 ** (1.7 * torch.rand((), generator=generator).item() - 0.3)
            made.append(
                Result(
                    case,
                    setting,
                    work,
                    peer,
                    "measured",
                    error=1e-7,
                    ours=measured(case, ours, 1 << 20),
                    theirs=None if peer == LIMIT else measured(case, factor * ours, 3 << 20),
                )
            )
    return made


def measured(case, milliseconds: float, size: int) -> Measured:
    if not case.step:
        return Measured(timing(milliseconds))
    return Measured(timing(milliseconds), timing(2.5 * milliseconds, 4), size, 2 * size)
