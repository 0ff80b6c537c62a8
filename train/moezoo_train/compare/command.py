"""``moezoo compare``: train a set of methods side by side, and say how they did."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moezoo.errors import InputError, check_choice
from moezoo_train.compare.plan import Run, plan
from moezoo_train.compare.report import write_report
from moezoo_train.compare.results import aggregate
from moezoo_train.compare.run import Result, build, execute, finished
from moezoo_train.compare.settings import (
    Experiment,
    ModelOptions,
    TextOptions,
    parse_methods,
)
from moezoo_train.optim import OptimizerConfig
from moezoo_train.prepare import prepare
from moezoo_train.progress import quiet_lightning
from moezoo_train.schedule import ScheduleConfig


def compare(
    methods: dict[str, Any],
    output: str = "runs/compare/default",
    baseline: str = "dense_mlp",
    layers: str | int | list[int] = "all",
    ablation: bool = True,
    seeds: list[int] = [0],  # noqa: B006 - never changed
    max_steps: int = 150,
    tolerance: float = 0.05,
    precision: str = "32-true",
    only: list[str] | None = None,
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> None:
    """Train methods side by side at equal active FLOPs, and beside their random routing.

    Every method learns from the same text, the same tokens in the same order and the same seeds.
    Its width is solved so that a token costs what it costs in the baseline. Beside each method
    stands its ablation, in which who answers does not depend on the token. A run that is finished
    is not repeated: interrupt it, add methods or seeds, and run the same command again.

    Args:
        methods: rows of the table: a name, and in what the method differs from the zoo's (method,
            arguments, layers, width, ablation, optimizer).
        output: directory of the comparison; table.md, results.csv, results.json and loss.png are
            written to it, and a folder for each run.
        baseline: method of the zoo whose FLOPs the others meet; blocks that a method does not take
            have it too.
        layers: blocks that get the method: all, every 2, 3, or [3, 7].
        ablation: also train every method that routes with random routing.
        seeds: each method is trained once with each.
        max_steps: optimizer steps of every run.
        tolerance: largest relative difference of a layer's FLOPs from the baseline's.
        precision: as the trainer's, e.g. 32-true or bf16-mixed.
        only: train and show these rows only.
        model: the decoder around the layers.
        text: what is learned from.
        optimizer: how parameters are updated; the layers' own learning-rate multipliers hold.
        schedule: how the learning rate moves.

    Raises:
        InputError: the configuration is no good, which shows before anything is trained; or a run
            failed, which shows after the others are finished and the table is written.
    """
    rows = parse_methods(methods)
    for name in only or []:
        check_choice("only", name, rows)
    experiment = Experiment(
        methods={name: row for name, row in rows.items() if only is None or name in only},
        baseline=baseline,
        layers=layers,
        ablation=ablation,
        seeds=tuple(seeds),
        max_steps=max_steps,
        tolerance=tolerance,
        model=model,
        text=text,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
    )
    runs = plan(experiment)
    _check(runs)
    results = _run_all(Path(output), runs, _prepare(text), Console(stderr=True))
    pairs = list(zip(runs, results, strict=True))
    files = write_report(
        Path(output),
        f"Methods at equal active FLOPs: {output}",
        experiment,
        aggregate(pairs),
        results,
    )
    print(f"{output}/ holds {', '.join(files)}.")
    failed = [str(run) for run, result in pairs if result.failure is not None]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}); "
            "the table says why, and running this again repeats them"
        )


def _check(runs: list[Run]) -> None:
    """Build every model without its weights: what is wrong shows before anything is trained."""
    for run in runs:
        if run.seed == runs[0].seed:
            with torch.device("meta"):
                build(run, run.experiment.text.vocab_size)


def _prepare(text: TextOptions) -> dict[str, Any]:
    return prepare(
        source=text.source,
        output=text.data_dir,
        vocab_size=text.vocab_size,
        val_fraction=text.val_fraction,
        max_bytes=text.max_bytes,
    ).inputs


def _run_all(output: Path, runs: list[Run], data: dict[str, Any], console: Console) -> list[Result]:
    """Train what is not finished, with a line for each run."""
    quiet_lightning()
    known = [finished(output, run, data) for run in runs]
    left = known.count(None)
    console.print(f"{len(runs)} runs, {len(runs) - left} of them finished before", highlight=False)
    results, seconds, done = [], 0.0, 0
    for number, (run, result) in enumerate(zip(runs, known, strict=True), 1):
        if result is None:
            started = time.perf_counter()
            result = execute(output, run, data, console)
            seconds += time.perf_counter() - started
            done += 1
            rest = seconds / done * (left - done)
            line = f"[{number}/{len(runs)}] {run}: {_outcome(result)}; {_minutes(rest)} left"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        results.append(result)
    return results


def _outcome(result: Result) -> str:
    if result.failure is not None:
        return f"failed, {result.failure}"
    speed = result.tokens_per_second / 1000
    return f"val loss {result.val_loss:.3f}, {result.seconds:.0f} s, {speed:.1f}k tok/s"


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
