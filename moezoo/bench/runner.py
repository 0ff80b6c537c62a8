"""Running a case: build, compare, then measure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moezoo.bench import gate
from moezoo.bench.case import Case, Contender, Peer, Problem, Setting, Unavailable, Work
from moezoo.bench.memory import saved_bytes, temporary_bytes
from moezoo.bench.timing import Timing, interleave

Outcome = Literal["measured", "differs", "missing", "failed", "skipped"]
OURS = "ours"
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
        ratios: end-to-end, the peer's time over ours, round by round.
        amount: end-to-end, of the case's unit in one run, as tokens or MB.
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
    ratios: tuple[float, ...] = ()
    amount: float = 1.0


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
    with thread_count(case.threads or options.threads), cleaned(setting.device):
        try:
            return _run(case, setting, wanted(case, options), options)
        except Exception as error:
            return unmeasured(case, options, "failed", f"ours: {say(error)}")


def skipped(case: Case, options: Options, reason: str) -> list[Result]:
    """Return the results of a case that was not run."""
    return unmeasured(case, options, "skipped", reason)


def unmeasured(case: Case, options: Options, outcome: Outcome, note: str) -> list[Result]:
    """Return the results of a case of which nothing was measured, and why."""
    setting = case.setting(options.quick, options.dtype)
    names = [*wanted(case, options), *([LIMIT] if case.limit else [])]
    return [Result(case, setting, None, name, outcome, note) for name in names]


def wanted(case: Case, options: Options) -> dict[str, Peer]:
    """Return the peers of a case that are meant."""
    return {
        name: peer
        for name, peer in case.peers.items()
        if options.peers is None or name in options.peers
    }


def _run(case: Case, setting: Setting, peers: Mapping[str, Peer], options: Options) -> list[Result]:
    torch.manual_seed(0)
    problem: Problem = case.build(setting)
    direction = _direction(case, problem)
    ours = gate.answer(problem.ours, direction)
    admitted = admit(
        peers,
        problem.parts,
        lambda contender: gate.difference(ours, gate.answer(contender, direction)),
        gate.tolerance(setting.dtype),
    )
    contenders: dict[str, Contender] = {OURS: problem.ours, **admitted.contenders}
    rejected, errors = admitted.rejected, admitted.errors
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
                    measured[OURS],
                    measured[name],
                )
            )
    if case.limit is not None:
        results.append(
            Result(case, setting, work, LIMIT, "measured", "", None, measured[OURS], None)
        )
    return results


class Admitted(NamedTuple):
    """The peers that may be measured, why others may not, and how far all are from ours."""

    contenders: dict[str, Any]
    rejected: dict[str, tuple[Outcome, str]]
    errors: dict[str, float]


def admit(
    peers: Mapping[str, Peer],
    parts: Any,
    compare: Callable[[Any], gate.Difference],
    tolerance: float,
) -> Admitted:
    """Build the peers and let in those that are there, run, and agree with ours.

    Args:
        peers: by name.
        parts: what they are built from.
        compare: finds how far one that computes the same is from ours.
        tolerance: the largest difference that rounding explains.
    """
    admitted = Admitted({}, {}, {})
    for name, peer in peers.items():
        try:
            if peer.package is not None:
                peer.package.check()
            contender = peer.build(parts)
            if peer.same:
                found = compare(contender)
                admitted.errors[name] = found.error
                if not found.error <= tolerance:
                    admitted.rejected[name] = ("differs", str(found))
                    continue
            admitted.contenders[name] = contender
        except Unavailable as error:
            admitted.rejected[name] = ("missing", str(error))
        except Exception as error:
            admitted.rejected[name] = ("failed", say(error))
    return admitted


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
    forward_times = interleave(forwards, device, options.runs, options.budget, always=OURS)
    step_times = interleave(steps, device, options.runs, options.budget, always=OURS)
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


def say(error: Exception) -> str:
    """Return an error as one line."""
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
def cleaned(device: torch.device) -> Iterator[None]:
    """Free memory after a case: the next one may need all of it."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
