"""Pictures of an experiment: panels with a line, or a dot, for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezoo_train.experiments.common.palette import GREY, LINES, MARKS
from moezoo_train.experiments.common.statistics import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NARROWEST = 5.2
"""Inches that the legend and the caption need."""


@dataclass(frozen=True)
class Line:
    """One contender: its name, and a value at each place of the horizontal axis."""

    name: str
    values: Sequence[Mean | None]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: Sequence[Line]


def means_of(seeds: int) -> str:
    """Return what is drawn, for a caption."""
    return f"Mean of {seeds} seeds ± standard error." if seeds > 1 else "One seed."


def draw_lines(
    panels: Sequence[Panel],
    places: Sequence[str],
    label: str,
    caption: str,
    grey: str | None = None,
) -> Figure:
    """Draw a line for each contender through its values, with errors.

    Args:
        panels: side by side; a name has the same colour in all of them.
        places: of the values, left to right.
        label: of the vertical axis.
        caption: under the picture.
        grey: the contender that the others are compared with.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colored = [name for name in names if name != grey]
    width = max(_NARROWEST, 3.1 * len(panels) + 0.6)
    figure = Figure(figsize=(width, 4.0), dpi=160, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            number = colored.index(line.name) if line.name in colored else 0
            color = GREY if line.name == grey else LINES[number % len(LINES)]
            known = [(x, value) for x, value in enumerate(line.values) if value is not None]
            # Side by side, lest error bars hide each other.
            shift = 0.0 if line.name == grey else 0.03 * (number - (len(colored) - 1) / 2)
            axes.errorbar(
                [x + shift for x, _ in known],
                [value.value for _, value in known],
                yerr=[value.error or 0.0 for _, value in known],
                fmt="x" if line.name == grey else MARKS[number % len(MARKS)],
                linestyle=(0, (4, 3)) if line.name == grey else "-",
                color=color,
                markersize=5,
                linewidth=1.2,
                capsize=2.5,
                label=line.name,
            )
        axes.set_title(panel.title, fontsize=8.5, loc="left")
        axes.set_xticks(range(len(places)), places, fontsize=7.5)
        axes.set_xlim(-0.35, len(places) - 0.65)
        axes.tick_params(axis="y", labelsize=7.5)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel(label, fontsize=8.5)
    figure.supxlabel(caption, fontsize=7, color="#555555")
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(
        list(labelled.values()),
        list(labelled),
        loc="outside upper center",
        ncols=min(len(labelled), int(width / 1.3)),
        frameon=False,
        fontsize=8,
    )
    return figure
