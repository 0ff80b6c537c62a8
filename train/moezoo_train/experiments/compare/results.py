"""From runs to rows: means and standard errors over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moezoo_train.experiments.common.statistics import Mean, mean
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.runs import Run


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to say.

    Attributes:
        name: of the row.
        layer: class of its layer.
        layers: blocks that hold it.
        width: the argument that was solved for, and its value.
        causal: whether the loss is that of a causal language model.
        loss: validation loss in nats per token.
        bits_per_byte: the same per byte of text.
        random_loss: validation loss of the random-routing ablation.
        gain: ablation less method, paired by seed: the value of routing by content.
        total_parameters: of the model.
        active_parameters: those that one token touches.
        flops_ratio: the layer's active FLOPs per token over the baseline's.
        tokens_per_second: of training, mean over seeds.
        evenness: as in :class:`moezoo_train.experiments.compare.execution.RunResult`, mean over
            seeds.
        busiest: likewise, the largest.
        usage: likewise, mean over seeds.
        unevenness: likewise, mean over seeds.
        peak_memory: of training in bytes, the largest over seeds.
        failures: one line per failed run.
    """

    name: str
    layer: str
    layers: tuple[int, ...]
    width: tuple[str, int] | None
    causal: bool
    loss: Mean | None
    bits_per_byte: Mean | None
    random_loss: Mean | None
    gain: Mean | None
    total_parameters: int | None
    active_parameters: int | None
    flops_ratio: float
    tokens_per_second: float | None
    evenness: float | None
    busiest: float | None
    usage: float | None
    unevenness: float | None
    peak_memory: int | None
    failures: tuple[str, ...]


def aggregate(results: Iterable[tuple[Run, RunResult]]) -> list[Row]:
    """Average runs into rows, the lowest loss first; rows without a loss come last."""
    by_row: dict[str, list[tuple[Run, RunResult]]] = {}
    for run, result in results:
        by_row.setdefault(run.row, []).append((run, result))
    rows = [_row(members) for members in by_row.values()]
    return sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss.value)


def _row(members: list[tuple[Run, RunResult]]) -> Row:
    first = members[0][0]
    good = [(run, result) for run, result in members if result.failure is None]
    learned = {run.seed: result for run, result in good if not run.random}
    random = {run.seed: result for run, result in good if run.random}
    both = [seed for seed in learned if seed in random]
    own = list(learned.values())
    speed = mean([r.tokens_per_second for r in own])
    return Row(
        name=first.row,
        layer=str((first.memory or first.ffn)["class_path"]).rpartition(".")[2],
        layers=first.layers,
        width=(first.width, first.ffn["init_args"][first.width]) if first.width else None,
        causal=first.causal,
        loss=mean([r.val_loss for r in own]),
        bits_per_byte=mean([r.bits_per_byte for r in own]),
        random_loss=mean([r.val_loss for r in random.values()]),
        gain=mean([random[seed].val_loss - learned[seed].val_loss for seed in both]),
        total_parameters=own[0].total_parameters if own else None,
        active_parameters=own[0].active_parameters if own else None,
        flops_ratio=first.flops_ratio,
        tokens_per_second=speed.value if speed else None,
        evenness=_average(r.evenness for r in own),
        busiest=max((r.busiest for r in own if r.busiest is not None), default=None),
        usage=_average(r.usage for r in own),
        unevenness=_average(r.unevenness for r in own),
        peak_memory=max((r.peak_memory for r in own if r.peak_memory is not None), default=None),
        failures=tuple(f"{run}: {r.failure}" for run, r in members if r.failure is not None),
    )


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


LOADS = ("evenness", "usage", "busiest", "unevenness")
"""Fields of a run's result about its load on the validation text."""


def loads(rows: Iterable[Row], results: Iterable[RunResult]) -> dict[str, dict[str, Mean]]:
    """Average what the runs say of their load, with errors; by row, then by measure.

    Rows that count nothing are left out, and so are their random-routing ablations.
    """
    by_run = {result.run: result for result in results if result.failure is None}
    found = {}
    for row in rows:
        own = [r for r in by_run.values() if r.run.removeprefix(f"{row.name}-").isdigit()]
        measures = {
            name: mean([value for r in own if (value := getattr(r, name)) is not None])
            for name in LOADS
        }
        known = {name: value for name, value in measures.items() if value is not None}
        if known:
            found[row.name] = known
    return found


def parse_row(values: Mapping[str, Any]) -> Row:
    """Read a row of ``results.json``; measures that an earlier version lacked are None.

    Raises:
        KeyError: it is no row.
        TypeError: likewise.
    """
    known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(Row)}
    for name in ("loss", "bits_per_byte", "random_loss", "gain"):
        known[name] = None if known[name] is None else Mean(**known[name])
    known |= {name: tuple(values[name]) for name in ("layers", "failures")}
    known["width"] = tuple(known["width"]) if known["width"] else None
    return Row(**known)
