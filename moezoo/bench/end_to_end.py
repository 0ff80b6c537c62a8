"""Whole steps, replies and commands: what a user waits for, against others that do the same.

Cases of kind end-to-end are declared where the code is that they measure, in packages that this one
does not import: :data:`moezoo.bench.registry.FURTHER` names them. Every contender does the same
task; what it has made is compared first, and the wrong gets no speed. The contenders then take
turns, so that each round gives a ratio.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moezoo.bench import gate
from moezoo.bench.case import Case, Unavailable
from moezoo.bench.runner import (
    OURS,
    Measured,
    Options,
    Result,
    admit,
    cleaned,
    say,
    thread_count,
    unmeasured,
    wanted,
)
from moezoo.bench.timing import Timing

_BUDGET = 10.0  # seconds per case, after which there are fewer rounds
_FEWEST = 3


class Spent(NamedTuple):
    """What one run took: seconds, and for a command its peak memory in bytes."""

    seconds: float
    memory: int | None = None


@dataclass(frozen=True)
class Job:
    """One way to do a task.

    Attributes:
        run: does it once and returns what that took.
        answer: does it once and returns what it has made, by name. Whole numbers must be equal,
            others agree in the Euclidean norm.
        memory: the bytes that a run holds at most, where ``run`` does not return them.
        note: printed with the row.
    """

    run: Callable[[], Spent]
    answer: Callable[[], Mapping[str, Tensor]]
    memory: Callable[[], int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A case of kind end-to-end made concrete.

    Attributes:
        ours: our way to do it.
        parts: what peers are built from.
        amount: of the case's unit in one run: tokens, or MB.
        tolerance: the largest relative error that rounding explains.
    """

    ours: Job
    parts: Any
    amount: float = 1.0
    tolerance: float = 2e-5


def timed(call: Callable[[], object]) -> Callable[[], Spent]:
    """Return a run in this process, by the clock on the wall."""

    def run() -> Spent:
        start = time.perf_counter()
        call()
        return Spent(time.perf_counter() - start)

    return run


_WITNESS = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write(f"{code} {used.ru_utime + used.ru_stime} {used.ru_maxrss}")
"""
"""A small process between this one and a command: Linux counts a new process's memory from that of
the one that started it, which has torch and models."""


class Finished(NamedTuple):
    """A command that has ended well: what it took, and what it has printed."""

    spent: Spent
    output: str


def run_command(words: Sequence[str]) -> Finished:
    """Run a command in a process of its own; its time is CPU-seconds of all its threads.

    It finds the modules that this process finds.

    Raises:
        RuntimeError: it fails; with the end of what it has printed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        report = Path(folder) / "spent"
        subprocess.run(
            [sys.executable, "-S", "-c", _WITNESS, report, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            check=False,
        )
        output.seek(0)
        printed = output.read().decode(errors="replace")
        taken = report.read_text(encoding="utf-8").split() if report.exists() else ["lost"] * 3
    if taken[0] != "0":
        raise RuntimeError(f"{words[0]} fails with {taken[0]}: {printed.strip()[-150:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Finished(Spent(float(taken[1]), int(taken[2]) * scale), printed)


def run_whole(case: Case, options: Options) -> list[Result]:
    """Compare and measure all wanted peers of a case of kind end-to-end.

    Args:
        case: the task, and who does it.
        options: which peers are wanted, and how to measure.

    Returns:
        One result per peer. A peer that fails has the reason in its own; where ours fails, all do.
    """
    setting = case.setting(options.quick, None)
    with (
        thread_count(case.threads or options.threads),
        cleaned(setting.device),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            return _run(case, case.build(setting, Path(folder)), options)
        except Unavailable as error:
            return unmeasured(case, options, "skipped", str(error))
        except Exception as error:
            return unmeasured(case, options, "failed", f"ours: {say(error)}")


def _run(case: Case, task: Task, options: Options) -> list[Result]:
    setting, peers = case.setting(options.quick, None), wanted(case, options)
    ours = task.ours.answer()
    admitted = admit(peers, task.parts, lambda job: difference(ours, job.answer()), task.tolerance)
    jobs: dict[str, Job] = {OURS: task.ours, **admitted.contenders}
    rounds = take_turns(jobs, options.runs, _BUDGET)
    memory = {name: _memory(job, rounds[name]) for name, job in jobs.items()}
    measured = {
        name: Measured(Timing(tuple(spent.seconds for spent in each)), memory=memory[name])
        for name, each in rounds.items()
    }
    results = []
    for name in peers:
        error = admitted.errors.get(name)
        if name in admitted.rejected:
            outcome, note = admitted.rejected[name]
            results.append(Result(case, setting, None, name, outcome, note, error))
            continue
        pairs = zip(rounds[name], rounds[OURS], strict=True)
        results.append(
            Result(
                case,
                setting,
                None,
                name,
                "measured",
                jobs[name].note,
                error,
                measured[OURS],
                measured[name],
                tuple(theirs.seconds / max(mine.seconds, 1e-9) for theirs, mine in pairs),
                task.amount,
            )
        )
    return results


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> gate.Difference:
    """Find the largest relative error; infinite where whole numbers differ, or one is missing."""
    if not ours:
        return gate.Difference("nothing, which is all there is to compare", float("inf"))
    worst = gate.Difference("all", 0.0)
    for name, wanted_tensor in ours.items():
        if name not in theirs:
            return gate.Difference(f"{name}, which is missing", float("inf"))
        found = theirs[name]
        if wanted_tensor.is_floating_point():
            error = gate.relative_error(found, wanted_tensor)
        else:
            same = found.shape == wanted_tensor.shape and bool((found == wanted_tensor).all())
            error = 0.0 if same else float("inf")
        if not error <= worst.error:
            worst = gate.Difference(name, error)
    return worst


def take_turns(jobs: Mapping[str, Job], runs: int, budget: float) -> dict[str, list[Spent]]:
    """Run all jobs in turn, each as often as the others.

    Every second round goes backwards, so that none always follows the same other. The first is a
    warm-up and does not count, unless all are commands, which begin anew each time.

    Args:
        jobs: by name.
        runs: rounds.
        budget: seconds, after which there are fewer rounds, no fewer than three.
    """
    start = time.perf_counter()
    first = {name: job.run() for name, job in jobs.items()}
    once = time.perf_counter() - start
    count = min(runs, max(_FEWEST, int(budget / max(once, 1e-9))))
    spent: dict[str, list[Spent]] = {name: [] for name in jobs}
    if all(each.memory is not None for each in first.values()):
        spent = {name: [each] for name, each in first.items()}
        count -= 1
    order = list(jobs)
    for _ in range(count):
        for name in order:
            gc.collect()
            spent[name].append(jobs[name].run())
        order.reverse()
    return spent


def _memory(job: Job, spent: Sequence[Spent]) -> int | None:
    if job.memory is not None:
        return job.memory()
    return max((each.memory for each in spent if each.memory is not None), default=None)
