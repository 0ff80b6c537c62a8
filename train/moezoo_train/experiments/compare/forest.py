"""The picture of claims: each difference with its interval, beside a line at zero."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moezoo_train.experiments.common.palette import GREEN, GREY, RED
from moezoo_train.experiments.compare.claims import Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"holds": GREEN, "fails": RED, "undecided": GREY}
AXES = {
    "loss": "validation loss, lower by (nats per token)",
    "busiest": "busiest ÷ mean, lower by",
    "unevenness": "unevenness, lower by (nats)",
}


def forest(judged: Sequence[Judged], caption: str) -> Figure:
    """Draw the contests of all claims, a panel per measure.

    Args:
        judged: in the order they are drawn, from the top.
        caption: under the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = {name: [one for one in judged if one.claim.measure == name] for name in AXES}
    panels = {name: claims for name, claims in panels.items() if claims}
    lines = [sum(1 + len(one.contests) for one in claims) for claims in panels.values()]
    figure = Figure(figsize=(7.5, 1.5 + 0.24 * sum(lines)), dpi=200, layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=lines)[:, 0]
    for one_axes, (measure, claims) in zip(axes, panels.items(), strict=True):
        _panel(one_axes, claims)
        one_axes.set_xlabel(AXES[measure], fontsize=8)
    marks = [Line2D([], [], color=c, marker="o", label=name) for name, c in COLORS.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    note = "Mean difference and its 95 % interval over seeds; right of the line, as claimed."
    figure.supxlabel(f"{note}\n{caption}", fontsize=7, color="#555555")
    return figure


def _panel(axes: Any, claims: Sequence[Judged]) -> None:
    height, ticks, labels = 0, [], []
    for one in claims:
        says = textwrap.shorten(one.claim.says, 90, placeholder=" …")
        axes.annotate(
            says,
            (0.01, height),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            va="center",
            color=COLORS[one.verdict],
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
        for contest in one.contests:
            height += 1
            ticks.append(height)
            labels.append(f"{contest.lower} < {contest.higher}")
            if contest.gain is not None:
                value, color = contest.gain.value, COLORS[contest.verdict]
                axes.plot(value, height, "o", color=color, markersize=4)
                axes.hlines(
                    height, *(contest.interval or (value, value)), color=color, linewidth=1.3
                )
        height += 1
    axes.axvline(0, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(height - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
