"""A picture of collisions: how much of what slots are read for is foreign, against chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moezoo.analysis.collisions import Collisions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OWN, _ALL, _CHANCE = "#4878a8", "#c05038", "0.25"


def draw_collisions(found: Mapping[str, Collisions], title: str) -> Figure:
    """Draw the foreign share of one hash function and of all together, and what chance gives.

    Args:
        found: by the name that is written beside its bars.
        title: of the picture.

    Returns:
        A figure to ``savefig``. No display is needed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.3 + 0.45 * len(found)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    axes = figure.add_subplot()
    for row, each in enumerate(found.values()):
        axes.barh(row - 0.19, each.foreign, 0.36, color=_OWN, label="one hash function")
        axes.barh(row + 0.19, each.foreign_of_all, 0.36, color=_ALL, label="all of them together")
        axes.plot([each.by_chance] * 2, [row - 0.4, row], color=_CHANCE, label="one, by chance")
    axes.set_yticks(
        range(len(found)),
        [f"{name}\n{each.owners:,} in {each.slots:,}" for name, each in found.items()],
        fontsize=7,
    )
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, max(0.01, *(max(c.foreign, c.by_chance) for c in found.values())) * 1.05)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("share of the reads that are not a slot's most frequent owner's", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes.legend(named.values(), named.keys(), fontsize=7, frameon=False)
    return figure
