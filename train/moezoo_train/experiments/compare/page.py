"""One HTML page of a comparison that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.compare.claims import judge, parse_claims
from moezoo_train.experiments.compare.curves import Curve, focus, parse_curves
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.results import Row, loads, parse_row
from moezoo_train.experiments.compare.row_colors import FAMILIES, by_family, colors, family
from moezoo_train.experiments.compare.table import COLUMNS, HELP, NOTHING, cells_of, keys_of
from moezoo_train.measure.report import finite_or_null
from moezoo_train.measure.writing import write_text

SCRIPTS = ("drawing.js", "charts.js", "table.js", "page.js")
MOST_POINTS = 160
"""Points of a curve on the page; more of them are averaged in groups."""


@dataclass(frozen=True)
class Finished:
    """The results of a comparison, read from disk.

    Attributes:
        whole: its ``results.json``.
        rows: in it.
        results: in it.
        curves: of ``curves.csv``; none if there is no such file.
        config: ``config.yaml``, or None.
    """

    whole: Mapping[str, Any]
    rows: list[Row]
    results: list[RunResult]
    curves: list[Curve]
    config: str | None


def read_comparison(folder: Path) -> Finished:
    """Read what ``moezoo compare`` wrote, by an earlier version too.

    Raises:
        InputError: there is no comparison, or it cannot be read.
    """

    def text(name: str) -> str | None:
        path = folder / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    try:
        whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return Finished(
            whole=whole,
            rows=[parse_row(row) for row in whole["rows"]],
            results=[RunResult(**run) for run in whole["runs"]],
            curves=parse_curves(text("curves.csv") or ""),
            config=text("config.yaml"),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"comparison: {folder} holds none that can be read: {error}") from error


def write_page(path: Path, comparison: Finished) -> None:
    """Write the page of a comparison; without curves it has no chart of them."""
    write_text(path, render(contents(comparison)))


def contents(comparison: Finished) -> dict[str, Any]:
    """Gather what the page shows."""
    whole, rows, results = comparison.whole, comparison.rows, comparison.results
    experiment = whole["experiment"]
    baseline, num_layers = experiment["baseline"], experiment["model"]["num_layers"]
    palette, measures = colors(rows, baseline), loads(rows, results)
    title, _, subtitle = str(whole["title"]).partition(": ")
    grouped = by_family(rows, baseline)
    return {
        "title": title,
        "subtitle": subtitle,
        "notes": whole["notes"],
        "command": whole.get("command"),
        "config": comparison.config,
        "versions": versions(results),
        "runs": len(results),
        "baseline": baseline,
        "families": [name for name in FAMILIES if any(family(row) == name for row in rows)]
        if grouped
        else [],
        "columns": [
            {"name": name.lstrip(">"), "numeric": name.startswith(">"), "help": HELP[name]}
            for name in COLUMNS
        ],
        "rows": [
            {
                "name": row.name,
                "layer": row.layer,
                "family": family(row),
                "color": [palette[row.name].light, palette[row.name].dark],
                "causal": row.causal,
                "cells": cells_of(row, num_layers),
                "keys": keys_of(row, num_layers),
                "loss": _mean(row.loss),
                "random": _mean(row.random_loss),
                "gain": _mean(row.gain),
                "active": row.active_parameters,
                "load": {name: _mean(value) for name, value in measures.get(row.name, {}).items()},
            }
            for row in rows
        ],
        "curves": [_curve(curve) for curve in comparison.curves],
        "claims": [
            {
                "says": one.claim.says,
                "paper": one.claim.paper,
                "measure": one.claim.measure,
                "verdict": one.verdict,
                "contests": [
                    {
                        "lower": contest.lower,
                        "higher": contest.higher,
                        "gain": _mean(contest.gain),
                        "interval": contest.interval,
                        "verdict": contest.verdict,
                    }
                    for contest in one.contests
                ],
            }
            for one in judge(parse_claims(whole), results)
        ],
        "focus": focus(comparison.curves),
        "nothing": NOTHING,
    }


def versions(results: Iterable[RunResult]) -> list[dict[str, Any]]:
    """List the machines and versions that runs were made with, each with its number of runs."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.environment:
            version = {"moezoo": result.identity.get("moezoo"), **result.environment}
            entry = found.setdefault(json.dumps(version, sort_keys=True), {**version, "runs": 0})
            entry["runs"] += 1
    return list(found.values())


def _mean(mean: Mean | None) -> list[float | None] | None:
    return None if mean is None else [mean.value, mean.error]


def _curve(curve: Curve) -> dict[str, Any]:
    size = math.ceil(len(curve.points) / MOST_POINTS)
    groups = [curve.points[n : n + size] for n in range(0, len(curve.points), size)]
    losses = [sum(point.loss for point in group) / len(group) for group in groups]
    errors = [[point.error for point in group if point.error is not None] for group in groups]
    return {
        "row": curve.row,
        "random": curve.random,
        "tokens": [group[-1].tokens for group in groups],
        "flops": [_short(group[-1].flops) for group in groups],
        "seconds": [_short(group[-1].seconds) for group in groups],
        "loss": [_short(loss) for loss in losses],
        "error": [_short(max(group)) if group else None for group in errors],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def render(data: Mapping[str, Any]) -> str:
    """Put contents into the template, so that no text of theirs is taken for markup."""
    template = files("moezoo_train.experiments.compare") / "template"

    def read(name: str) -> str:
        return (template / name).read_text(encoding="utf-8")

    # Inside a script element only "<" could end it; "&" and ">" are escaped for good measure.
    text = json.dumps(finite_or_null(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": html.escape(f"{data['title']} · {data['subtitle'] or 'moezoo'}"),
        "style": read("style.css"),
        "script": "\n".join(read(name) for name in SCRIPTS),
        "data": text,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: parts[marker[1]], read("index.html"))
