"""``moezoo compare``: train a set of methods side by side, and say how they did."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from moezoo.errors import InputError, check_choice, check_number, going_on
from moezoo_models.checkpoints.locks import writing
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.short_run import prepare_text
from moezoo_train.experiments.compare.curves import flops_per_token, read_curves
from moezoo_train.experiments.compare.execution import RunResult, execute, finished
from moezoo_train.experiments.compare.report import write_report
from moezoo_train.experiments.compare.results import aggregate
from moezoo_train.experiments.compare.runs import Run, plan
from moezoo_train.experiments.compare.settings import Experiment, parse_claims, parse_methods
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.precision import precision_here


def compare(
    methods: dict[str, Any],
    output: str = "runs/compare/default",
    claims: dict[str, Any] = {},  # noqa: B006 - never changed
    baseline: str = "dense_mlp",
    layers: str | int | list[int] = "all",
    ablation: bool = True,
    seeds: list[int] = [0],  # noqa: B006 - never changed
    max_steps: int = 150,
    tolerance: float = 0.05,
    precision: str = "32-true",
    only: list[str] | None = None,
    minutes: float | None = None,
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> None:
    """Train methods side by side at equal active FLOPs, and beside their random routing.

    Every method learns from the same text, the same tokens in the same order and the same seeds.
    Its width is solved so that a token costs what it costs in the baseline. Beside each method
    stands its ablation, in which routing does not depend on the token. A run that is finished
    is not repeated: interrupt it, add methods or seeds, and run the same command again.

    Args:
        methods: rows of the table: a name, and in what the method differs from the zoo's (method,
            arguments, layers, width, ablation, optimizer).
        output: directory of the comparison; index.html, table.md, pictures and the numbers behind
            them are written to it, and a folder for each run.
        claims: what papers say of the rows: a name, and says, paper, order and measure; the report
            says which hold.
        baseline: method of the zoo whose FLOPs the others meet; blocks that a method does not take
            have it too.
        layers: blocks that get the method: all, every 2, 3, or [3, 7].
        ablation: also train every method that routes with random routing.
        seeds: each method is trained once with each.
        max_steps: optimizer steps of every run.
        tolerance: largest relative difference of a layer's FLOPs from the baseline's.
        precision: as the trainer's, e.g. 32-true or bf16-mixed; auto is bf16-mixed on a GPU that
            has bf16, else 32-true.
        only: train and show these rows only.
        minutes: begin no run that would likely end later than this; the same command goes on where
            it left off. With 0 nothing is trained, and what is finished is shown.
        model: the decoder around the layers.
        text: the training text.
        optimizer: how parameters are updated; the layers' own learning-rate multipliers hold.
        schedule: how the learning rate moves.

    Raises:
        InputError: the configuration is invalid, which shows before anything is trained; or a run
            failed, which shows after the others are finished and the table is written.
    """
    rows = parse_methods(methods)
    for name in only or []:
        check_choice("only", name, rows)
    taken = {name: row for name, row in rows.items() if only is None or name in only}
    experiment = Experiment(
        methods=taken,
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
        precision=precision_here(precision),
        claims={
            name: claim
            for name, claim in parse_claims(claims, rows).items()
            if all(row in taken for place in claim.places for row in place)
        },
    )
    if minutes is not None:
        check_number("minutes", minutes)
    runs = plan(experiment)
    flops = _check(runs)
    with writing(output), going_on("the same command keeps the runs that are finished"):
        results = _run_all(Path(output), runs, prepare_text(text), Console(stderr=True), minutes)
    pairs = [(run, result) for run, result in zip(runs, results, strict=True) if result]
    if not pairs:
        raise InputError(f"minutes: no run of {output} is finished yet; allow more of them")
    files = write_report(
        Path(output),
        f"Methods at equal active FLOPs: {output}",
        experiment,
        aggregate(pairs),
        [result for _, result in pairs],
        read_curves(Path(output), pairs, flops),
        [str(run) for run, result in zip(runs, results, strict=True) if not result],
    )
    print(f"{output}/ holds {', '.join(files)}.")
    failed = [str(run) for run, result in pairs if result.failure is not None]
    if failed:
        raise InputError(
            f"methods: {len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}); "
            "the table says why, and running this again repeats them"
        )


def _check(runs: list[Run]) -> dict[str, int]:
    """Build every model without its weights: what is wrong shows before anything is trained.

    Gives the forward FLOPs of a token by row.
    """
    return {run.row: flops_per_token(run) for run in runs if run.seed == runs[0].seed}


def _run_all(
    output: Path,
    runs: list[Run],
    data: dict[str, Any],
    console: Console,
    minutes: float | None,
) -> list[RunResult | None]:
    """Train what is not finished while there is time, with a line for each run."""
    quiet_lightning()
    results = [finished(output, run, data) for run in runs]
    left = results.count(None)
    console.print(f"{len(runs)} runs, {len(runs) - left} of them finished before", highlight=False)
    taken: list[float] = []
    for number, run in enumerate(runs, 1):
        if results[number - 1] is not None:
            continue
        if not fits(taken, minutes):
            console.print(
                f"no time for {left - len(taken)} runs; the same command goes on", highlight=False
            )
            break
        started = time.perf_counter()
        result = results[number - 1] = execute(output, run, data, console)
        taken.append(time.perf_counter() - started)
        rest = sum(taken) / len(taken) * (left - len(taken))
        line = f"[{number}/{len(runs)}] {run}: {_outcome(result)}; {_minutes(rest)} left"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return results


def fits(taken: list[float], minutes: float | None) -> bool:
    """Return whether another run ends in time if it takes as long as the longest before."""
    if minutes is None:
        return True
    return minutes > 0 and sum(taken) + max(taken, default=0.0) <= 60 * minutes


def _outcome(result: RunResult) -> str:
    if result.failure is not None:
        return f"failed, {result.failure}"
    speed = result.tokens_per_second / 1000
    return f"val loss {result.val_loss:.3f}, {result.seconds:.0f} s, {speed:.1f}k tok/s"


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
