"""``moezoo compare runs/a runs/b``: runs of ``moezoo fit`` in one picture and one table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moezoo.command.settings import read_settings
from moezoo.errors import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.directory import our_config
from moezoo_models.checkpoints.locks import writing
from moezoo_train.experiments.overlay_laws import Ended, fit_laws, results, tables
from moezoo_train.experiments.overlay_picture import Series, draw_runs
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.report import AVERAGED, finite_or_null
from moezoo_train.measure.throughput import count_parameters
from moezoo_train.measure.writing import save_figure, write_json

_OWN = ("output", "ckpt_path", "overwrite", "config")
"""Options that say where a run is, not what it is."""
_SHOWN = 48
"""Characters of an option's value."""


@dataclass(frozen=True)
class RunOutcome:
    """What a run came to so far.

    Attributes:
        name: its directory, as it was given.
        finished: whether it has ended as planned.
        steps: optimizer steps that it has logged.
        tokens: trained on by then.
        train_loss: nats per token, mean over the last twentieth of what was logged.
        val_loss: nats per token, at the last validation.
        best_val_loss: the lowest of all validations.
        val_bits_per_byte: the last one, per byte of text.
        total_parameters: of the model; None if the run is unfinished and has saved none.
        active_parameters: those that one token touches.
        flops: operations of training; None of runs that did not record them.
        seconds: of training, without validation.
        options: its configuration, by dotted keys.
        train: what was logged of its training loss.
        val: of its validation loss.
    """

    name: str
    finished: bool
    steps: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    val_bits_per_byte: float | None
    total_parameters: int | None
    active_parameters: int | None
    flops: float | None
    seconds: float
    options: dict[str, Any]
    train: Series
    val: Series

    def __str__(self) -> str:
        """Return its name, and where it stands if it has not ended."""
        return self.name if self.finished else f"{self.name} (unfinished, step {self.steps:,})"


def compare_runs(
    runs: list[str], output: str = "runs/compare/runs", law: str | None = None
) -> None:
    """Draw runs of moezoo fit over each other, and say what they came to and how they differ.

    Losses are drawn over tokens, and over FLOPs and time where those were logged. Runs that have
    not ended are taken as far as they are, and named as such.

    Args:
        runs: directories of runs.
        output: directory that runs.png, table.md and results.json are written to.
        law: also fit a scaling law to the last validation losses: average, of the mean parameters
            over training; sparse, of those that are left and of sparsity; or all that the runs
            allow. It is written to laws.json.

    Raises:
        InputError: a directory holds no run, or one that has logged nothing yet; or the runs do
            not make a law.
    """
    if len(runs) < 2:
        raise InputError("runs: give at least two directories of moezoo fit, as in: runs/a runs/b")
    if len({Path(name).resolve() for name in runs}) < len(runs):
        raise InputError("runs: one directory is given twice; name different ones")
    found = [read_run(name) for name in runs]
    observed, fits = fit_laws(law, [_ended(run) for run in found]) if law is not None else ([], [])
    parts = [*_tables(found), *(tables(observed, fits) if fits else ())]
    place, files = Path(output), "runs.png, table.md, results.json"
    with writing(place):
        save_figure(place / "runs.png", draw_runs([(str(r), r.train, r.val) for r in found]))
        with atomic_write(place / "table.md", "w") as file:
            file.write(markdown(parts))
        kept = [
            {**asdict(run), "train": run.train.lists(), "val": run.val.lists()} for run in found
        ]
        write_json(place / "results.json", finite_or_null(kept), allow_nan=False)
        if fits:
            write_json(place / "laws.json", results(observed, fits), allow_nan=False)
            files += ", laws.json"
    console = Console()
    for title, head, rows in parts:
        console.print(_grid(title, head, rows))
    print(f"{output}/ holds {files}.")


def _ended(run: RunOutcome) -> Ended:
    return Ended(run.name, run.finished, run.tokens, run.val_loss)


def read_run(name: str) -> RunOutcome:
    """Read what a run has left.

    Args:
        name: its directory.

    Raises:
        InputError: it is none, has logged nothing yet, or a file of it is damaged.
    """
    path = Path(name)
    for file in ("config.yaml", "metrics.csv"):
        if not (path / file).is_file():
            what = f"it has no {file}" if path.is_dir() else "there is no such directory"
            raise InputError(f"runs: {name} is no run of moezoo fit: {what}; name another")
    rows = read_metrics(path / "metrics.csv")
    try:
        train, val = _series(rows, "train/loss"), _series(rows, "val/loss")
        bits = [float(row["val/bits_per_byte"]) for row in rows if "val/bits_per_byte" in row]
    except (ValueError, KeyError) as error:
        raise InputError(f"runs: {path / 'metrics.csv'} is damaged; name another run") from error
    if not len(train.tokens) and not len(val.tokens):
        raise InputError(f"runs: {name} has logged no loss yet; wait for its first logged step")
    steps = max(int(row["step"]) for row in rows)
    report = _report(path)
    finished = report is not None and report.get("steps", -1) >= steps
    losses = train.loss[-max(1, round(AVERAGED * len(train.loss))) :]
    total, active = _parameters(path, report if finished else None)
    latest = max((train, val), key=lambda series: series.tokens[-1] if len(series.tokens) else -1)
    return RunOutcome(
        name=name,
        finished=finished,
        steps=steps,
        tokens=int(latest.tokens[-1]),
        train_loss=float(np.mean(losses)) if len(losses) else None,
        val_loss=float(val.loss[-1]) if len(val.loss) else None,
        best_val_loss=float(val.loss.min()) if len(val.loss) else None,
        val_bits_per_byte=bits[-1] if bits else None,
        total_parameters=total,
        active_parameters=active,
        flops=None if latest.flops is None else float(latest.flops[-1]),
        seconds=float(latest.seconds[-1]),
        options=dict(_leaves(read_settings(str(path / "config.yaml")))),
        train=train,
        val=val,
    )


def _report(path: Path) -> dict[str, Any] | None:
    file = path / "report.json"
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"runs: {file} is damaged; remove it, or name another run") from error
    return report if isinstance(report, dict) else None


def _series(rows: Sequence[Mapping[str, str]], name: str) -> Series:
    """Return what was logged of a loss, against tokens, FLOPs and seconds of training."""
    clock = [(0.0, 0.0)]
    for row in rows:
        if "train/tokens_per_second" in row:
            tokens, (before, seconds) = float(row["tokens"]), clock[-1]
            speed = max(float(row["train/tokens_per_second"]), 1e-9)
            clock.append((tokens, seconds + (tokens - before) / speed))
    rates = [float(r["train/flops"]) / float(r["tokens"]) for r in rows if "train/flops" in r]
    points = [(float(row["tokens"]), float(row[name])) for row in rows if name in row]
    finite = [point for point in points if math.isfinite(point[1])]
    reached = np.array([tokens for tokens, _ in finite])
    return Series(
        tokens=reached,
        flops=reached * rates[-1] if rates else None,
        seconds=np.interp(reached, [t for t, _ in clock], [s for _, s in clock]),
        loss=np.array([loss for _, loss in finite]),
    )


def _parameters(path: Path, report: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Return total and active parameters: as reported, or those of the model that was saved."""
    if report is not None:
        return report.get("total_parameters"), report.get("active_parameters")
    try:
        raw = json.loads((path / "model" / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            return count_parameters(MoezooForCausalLM(our_config(raw)))
    except (OSError, ValueError):  # not saved yet, or a stock model
        return None, None


def differences(runs: Sequence[RunOutcome]) -> list[tuple[str, list[Any]]]:
    """Return the options in which runs differ, each with every run's value; None for without."""
    keys = dict.fromkeys(key for run in runs for key in run.options)
    values = [(key, [run.options.get(key) for run in runs]) for key in keys]
    return [(key, own) for key, own in values if any(value != own[0] for value in own)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if path or key not in _OWN:
                yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


def _tables(runs: Sequence[RunOutcome]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, head and rows of the tables."""
    rows = [
        ("state", ["finished" if r.finished else "unfinished" for r in runs]),
        ("steps", [f"{r.steps:,}" for r in runs]),
        ("tokens", [f"{r.tokens:,}" for r in runs]),
        ("train loss", [_number(r.train_loss, ".3f") for r in runs]),
        ("val loss", [_number(r.val_loss, ".3f") for r in runs]),
        ("lowest val loss", [_number(r.best_val_loss, ".3f") for r in runs]),
        ("val bits per byte", [_number(r.val_bits_per_byte, ".3f") for r in runs]),
        ("parameters", [_number(r.total_parameters, ",") for r in runs]),
        ("active per token", [_number(r.active_parameters, ",") for r in runs]),
        ("training FLOPs", [_number(r.flops, ".3g") for r in runs]),
        ("training time", [f"{r.seconds:,.0f} s" for r in runs]),
    ]
    names = [run.name for run in runs]
    yield "Runs", ["", *names], [[name, *values] for name, values in rows]
    changed = [[key, *map(_shown, values)] for key, values in differences(runs)]
    yield (
        "What differs between their options",
        ["", *names],
        changed or [["nothing", *[""] * len(runs)]],
    )


def markdown(pages: Sequence[tuple[str, list[str], list[list[str]]]]) -> str:
    """Return tables, each with title, head and rows, as a page."""
    parts = []
    for title, head, rows in pages:
        lines = [head, ["---"] * len(head), *rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join(parts) + "\n\n![Losses of the runs](runs.png)\n"


def _grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        grid.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
