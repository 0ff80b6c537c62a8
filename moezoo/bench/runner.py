"""Running a case: build, compare, then measure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moezoo.bench import gate
from moezoo.bench.case import Case, Contender, Peer, Problem, Setting, Unavailable, Work
from moezoo.bench.memory import saved_bytes, temporary_bytes
from moezoo.bench.timing import Timing, interleave

Outcome = Literal["measured", "differs", "missing", "failed", "skipped"]
_OURS = "ours"
LIMIT = "limit"


@dataclass(frozen=True)
class Measured:
    """The time and memory that one contender took.

    Attributes:
        forward: time without gradients.
        step: time of forward and backward, if the case has a backward.
        saved: bytes kept between the two.
        memory: most bytes held for a while, beside operands and gradients.
    """

    forward: Timing
    step: Timing | None = None
    saved: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Result:
    """One case against one peer.

    Attributes:
        case: the case.
        setting: the sizes it was run with.
        work: what must be done at least, forward and in forward and backward.
        peer: the peer's name, or ``limit`` for what the machine allows.
        outcome: what became of it; only ``measured`` has times.
        note: why there are no times, or what the peer wants said.
        error: the largest relative error against ours, of peers that compute the same.
        ours: our measurements.
        theirs: the peer's.
    """

    case: Case
    setting: Setting
    work: tuple[Work, Work] | None
    peer: str
    outcome: Outcome
    note: str = ""
    error: float | None = None
    ours: Measured | None = None
    theirs: Measured | None = None


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        quick: small sizes.
        dtype: instead of each case's own.
        peers: names; None for all.
        runs: samples per contender.
        budget: seconds per contender and direction, after which slow ones get fewer samples.
        threads: of torch, on CPUs; None for what is set.
    """

    quick: bool = False
    dtype: torch.dtype | None = None
    peers: frozenset[str] | None = None
    runs: int = 10
    budget: float = 8.0
    threads: int | None = None


def run_case(case: Case, options: Options) -> list[Result]:
    """Compare and measure all wanted peers of a case.

    Args:
        case: the work, and its implementations.
        options: which peers are wanted, and how to measure.

    Returns:
        One result per peer. A peer that fails has the reason in its own; where ours fails, all do.
    """
    setting = case.setting(options.quick, options.dtype)
    with thread_count(case.threads or options.threads), _cleaned(setting.device):
        try:
            return _run(case, setting, _wanted(case, options), options)
        except Exception as error:
            return _unmeasured(case, options, "failed", f"ours: {_say(error)}")


def skipped(case: Case, options: Options, reason: str) -> list[Result]:
    """Return the results of a case that was not run."""
    return _unmeasured(case, options, "skipped", reason)


def _unmeasured(case: Case, options: Options, outcome: Outcome, note: str) -> list[Result]:
    setting = case.setting(options.quick, options.dtype)
    names = [*_wanted(case, options), *([LIMIT] if case.limit else [])]
    return [Result(case, setting, None, name, outcome, note) for name in names]


def _wanted(case: Case, options: Options) -> dict[str, Peer]:
    return {
        name: peer
        for name, peer in case.peers.items()
        if options.peers is None or name in options.peers
    }


def _run(case: Case, setting: Setting, peers: Mapping[str, Peer], options: Options) -> list[Result]:
    torch.manual_seed(0)
    problem = case.build(setting)
    contenders, rejected, errors = _admit(case, setting, problem, peers)
    measured = _measure(case, setting, contenders, options)
    work = (problem.work, problem.step_work)
    results = []
    for name in peers:
        if name in rejected:
            outcome, note = rejected[name]
            results.append(Result(case, setting, work, name, outcome, note, errors.get(name)))
        else:
            results.append(
                Result(
                    case,
                    setting,
                    work,
                    name,
                    "measured",
                    contenders[name].note,
                    errors.get(name),
                    measured[_OURS],
                    measured[name],
                )
            )
    if case.limit is not None:
        results.append(
            Result(case, setting, work, LIMIT, "measured", "", None, measured[_OURS], None)
        )
    return results


def _admit(
    case: Case, setting: Setting, problem: Problem, peers: Mapping[str, Peer]
) -> tuple[dict[str, Contender], dict[str, tuple[Outcome, str]], dict[str, float]]:
    """Build the peers and let in those that are there, run, and agree with ours."""
    direction = _direction(case, problem)
    ours = gate.answer(problem.ours, direction)
    contenders: dict[str, Contender] = {_OURS: problem.ours}
    rejected: dict[str, tuple[Outcome, str]] = {}
    errors: dict[str, float] = {}
    for name, peer in peers.items():
        try:
            if peer.package is not None:
                peer.package.check()
            contender = peer.build(problem.parts)
            if peer.same:
                found = gate.difference(ours, gate.answer(contender, direction))
                errors[name] = found.error
                if not gate.agrees(found, setting.dtype):
                    rejected[name] = ("differs", str(found))
                    continue
            contenders[name] = contender
        except Unavailable as error:
            rejected[name] = ("missing", str(error))
        except Exception as error:
            rejected[name] = ("failed", _say(error))
    return contenders, rejected, errors


def _direction(case: Case, problem: Problem) -> Tensor | None:
    """Return the output's gradient; None where no backward is wanted."""
    if problem.direction is not None:
        return problem.direction
    if not case.step:
        return None
    with torch.no_grad():
        return torch.randn_like(problem.ours.forward())


def _measure(
    case: Case, setting: Setting, contenders: Mapping[str, Contender], options: Options
) -> dict[str, Measured]:
    device = setting.device
    forwards: dict[str, Callable[[], object]] = {
        name: partial(_forward, contender) for name, contender in contenders.items()
    }
    steps: dict[str, Callable[[], object]] = {}
    saved: dict[str, int] = {}
    memory: dict[str, int] = {}
    if case.step:
        for name, contender in contenders.items():
            with contender.within(), torch.no_grad():
                direction = torch.randn_like(contender.forward())
            step = partial(_step, contender, direction)
            steps[name] = step
            saved[name] = saved_bytes(contender)
            memory[name] = temporary_bytes(step, device)
    forward_times = interleave(forwards, device, options.runs, options.budget, always=_OURS)
    step_times = interleave(steps, device, options.runs, options.budget, always=_OURS)
    return {
        name: Measured(forward_times[name], step_times.get(name), saved.get(name), memory.get(name))
        for name in contenders
    }


def _forward(contender: Contender) -> Tensor:
    with contender.within(), torch.no_grad():
        return contender.forward()


def _step(contender: Contender, direction: Tensor) -> tuple[Tensor, ...]:
    with contender.within():
        output = contender.forward()
        return torch.autograd.grad(output, list(contender.operands.values()), direction)


def _say(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _cleaned(device: torch.device) -> Iterator[None]:
    """Free memory after a case: the next one may need all of it."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
