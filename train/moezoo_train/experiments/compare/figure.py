"""The pictures of a comparison: losses, learning curves, parameters and load, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.compare.claims import Judged
from moezoo_train.experiments.compare.curves import Curve
from moezoo_train.experiments.compare.forest import forest
from moezoo_train.experiments.compare.panels import compute, load, parameters
from moezoo_train.experiments.compare.results import Row
from moezoo_train.measure.writing import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, RANDOM, BASELINE = "#1f4e9c", "#d1495b", "#555555"


def draw(
    folder: Path,
    rows: list[Row],
    curves: Sequence[Curve],
    measures: Mapping[str, Mapping[str, Mean]],
    baseline: str,
    caption: str,
    judged: Sequence[Judged] = (),
) -> list[str]:
    """Write every picture that there are numbers for, and return the files' names.

    Args:
        folder: where they go.
        rows: best first.
        curves: how their losses fell.
        measures: of the load, by row, as
            :func:`moezoo_train.experiments.compare.results.loads` returns them.
        baseline: name of the row that the others are compared with.
        caption: under each picture.
        judged: claims about the rows.
    """
    figures = {}
    if any(row.loss for row in rows):
        figures["loss"] = losses(rows, baseline, caption)
        figures["parameters"] = parameters(rows, baseline, caption)
    if curves:
        figures["compute"] = compute(rows, curves, baseline, caption)
    if measures:
        figures["load"] = load(rows, measures, baseline, caption)
    if any(contest.interval for one in judged for contest in one.contests):
        figures["claims"] = forest(judged, caption)
    return [name for stem, figure in figures.items() for name in _save(folder, stem, figure)]


def _save(folder: Path, stem: str, figure: Figure) -> list[str]:
    names = [f"{stem}.png", f"{stem}.svg"]
    for name in names:
        save_figure(folder / name, figure)
    return names


def losses(rows: list[Row], baseline: str, caption: str) -> Figure:
    """Draw a dot per method, the best on top, and a ring for its ablation.

    Args:
        rows: sorted by loss; those without one are left out.
        baseline: name of the row that gets a line through all others.
        caption: under the picture.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.loss is not None]
    figure = Figure(figsize=(7, 1.4 + 0.26 * len(shown)), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    heights = list(range(len(shown)))
    for height, row in zip(heights, shown, strict=True):
        if row.loss and row.random_loss:
            ends = [row.loss.value, row.random_loss.value]
            axes.plot(ends, [height, height], color="#bbbbbb", linewidth=1.4, zorder=1)
    _dots(axes, [(h, row.random_loss) for h, row in zip(heights, shown, strict=True)], True)
    _dots(axes, [(h, row.loss) for h, row in zip(heights, shown, strict=True)], False)
    for row in shown:
        if row.name == baseline and row.loss:
            axes.axvline(
                row.loss.value,
                color=BASELINE,
                linewidth=0.9,
                linestyle=(0, (4, 3)),
                zorder=0,
                label=f"{baseline}, the baseline",
            )
    axes.set_yticks(heights, [row.name if row.causal else f"{row.name} †" for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("validation loss (nats per token)")
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    if any(not row.causal for row in shown):
        caption += " † not causal."
    figure.supxlabel(caption, fontsize=7, color=BASELINE)
    return figure


def _dots(axes: Any, points: list[tuple[int, Mean | None]], random: bool) -> None:
    there = [(height, value) for height, value in points if value is not None]
    if not there:
        return
    color = RANDOM if random else OWN
    errors = [value.error or 0.0 for _, value in there]
    axes.errorbar(
        [value.value for _, value in there],
        [height for height, _ in there],
        xerr=errors if any(errors) else None,
        fmt="o",
        color=color,
        markerfacecolor="white" if random else color,
        markersize=7 if random else 4.5,
        capsize=2,
        linewidth=1,
        zorder=2 if random else 3,
        label="its random-routing ablation" if random else "method",
    )
