"""How the loss fell: the runs' ``metrics.csv``, averaged over seeds, against compute and time."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moezoo_train.experiments.common.statistics import mean
from moezoo_train.experiments.compare.execution import RunResult, build
from moezoo_train.experiments.compare.runs import Run
from moezoo_train.experiments.compare.sparse_ift import kept_flops
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.throughput import forward_flops_per_token

TRAINING = 3
"""A training step takes thrice the forward pass: the backward pass takes twice of it."""


@dataclass(frozen=True)
class Point:
    """One logged step, a mean over seeds.

    Attributes:
        tokens: trained on so far.
        flops: that took, counting three times the active FLOPs of the forward pass.
        seconds: that took, validation not included.
        loss: training loss in nats per token, mean of the steps since the point before.
        error: its standard error; None for a single seed.
    """

    tokens: int
    flops: float
    seconds: float
    loss: float
    error: float | None


@dataclass(frozen=True)
class Curve:
    """The training loss of a row, or of its random-routing ablation."""

    row: str
    random: bool
    points: tuple[Point, ...]


def flops_per_token(run: Run) -> int:
    """Count a token's active FLOPs in the forward pass of a run's model, which gets no weights.

    Where zeros are not to be computed, those of the weights that are kept.

    Raises:
        InputError: the model cannot be built.
    """
    with torch.device("meta"):
        model = build(run, run.experiment.text.vocab_size).model
    flops = forward_flops_per_token(model, run.experiment.text.sequence_length)
    if run.kept:
        layers = [
            block.mlp for index, block in enumerate(model.model.layers) if index in run.layers
        ]
        flops -= sum(layer.cost().flops_per_token - kept_flops(layer) for layer in layers)
    return flops


def read_curves(
    output: Path, pairs: Iterable[tuple[Run, RunResult]], flops: Mapping[str, int]
) -> list[Curve]:
    """Read what the runs logged; runs that failed or logged nothing have no part in it.

    Args:
        output: the comparison's directory.
        pairs: runs and their results.
        flops: forward FLOPs of a token, by row.
    """
    seeds: dict[tuple[str, bool], list[dict[int, tuple[float, float]]]] = {}
    for run, result in pairs:
        logged = _logged(output / run.folder / "metrics.csv") if result.failure is None else {}
        if logged:
            seeds.setdefault((run.row, run.random), []).append(logged)
    return [
        Curve(row, random, tuple(_average(members, TRAINING * flops[row])))
        for (row, random), members in seeds.items()
    ]


def _logged(path: Path) -> dict[int, tuple[float, float]]:
    """Return loss and seconds so far by tokens so far."""
    points, seconds, before = {}, 0.0, 0
    for row in read_metrics(path):
        if "train/loss" not in row:
            continue
        tokens = int(float(row["tokens"]))
        seconds += (tokens - before) / max(float(row["train/tokens_per_second"]), 1e-9)
        before = tokens
        if math.isfinite(float(row["train/loss"])):
            points[tokens] = (float(row["train/loss"]), seconds)
    return points


def _average(seeds: Sequence[Mapping[int, tuple[float, float]]], cost: int) -> Iterable[Point]:
    shared = set(seeds[0]).intersection(*seeds[1:])
    for tokens in sorted(shared):
        loss = mean([seed[tokens][0] for seed in seeds])
        seconds = mean([seed[tokens][1] for seed in seeds])
        assert loss is not None
        assert seconds is not None
        yield Point(tokens, float(cost) * tokens, seconds.value, loss.value, loss.error)


def curves_csv(curves: Iterable[Curve]) -> str:
    """Write curves as a table, one line for each point."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "random_routing", "tokens", "flops", "seconds", "loss", "error"])
    for curve in curves:
        for point in curve.points:
            error = "" if point.error is None else f"{point.error:.6g}"
            writer.writerow(
                [
                    curve.row,
                    curve.random,
                    point.tokens,
                    f"{point.flops:.6g}",
                    f"{point.seconds:.6g}",
                    f"{point.loss:.6g}",
                    error,
                ]
            )
    return buffer.getvalue()


def parse_curves(text: str) -> list[Curve]:
    """Read what :func:`curves_csv` wrote.

    Raises:
        ValueError: it is something else.
        KeyError: likewise.
    """
    found: dict[tuple[str, bool], list[Point]] = {}
    for line in csv.DictReader(io.StringIO(text)):
        point = Point(
            tokens=int(line["tokens"]),
            flops=float(line["flops"]),
            seconds=float(line["seconds"]),
            loss=float(line["loss"]),
            error=float(line["error"]) if line["error"] else None,
        )
        found.setdefault((line["method"], line["random_routing"] == "True"), []).append(point)
    return [Curve(row, random, tuple(points)) for (row, random), points in found.items()]


def focus(curves: Iterable[Curve]) -> tuple[float, float] | None:
    """Return the range of losses that tells methods apart: after the first quarter of each run.

    The fall from the logarithm of the vocabulary would fill the picture otherwise.
    """
    late = [
        point.loss
        for curve in curves
        for point in curve.points
        if point.tokens >= curve.points[-1].tokens / 4
    ]
    if not late:
        return None
    margin = 0.04 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin
