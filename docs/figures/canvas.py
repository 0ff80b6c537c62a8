"""What the figures of the layers' pages are drawn with."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, PALE, GREY, LINE, INK = "#1f4e9c", "#dfe9f8", "#eef0f3", "#b4bcc6", "#20262e"
Point = tuple[float, float]


class Canvas:
    """A figure of 100 by ``height`` units, with the few marks that the diagrams are made of."""

    def __init__(self, height: float = 40.0) -> None:
        self.figure = Figure(figsize=(7.2, 0.072 * height), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 100), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 8, on: bool = True) -> None:
        """Write centred text."""
        color = INK if on else "#7b8592"
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, color=color)

    def box(
        self, x: float, y: float, text: str = "", w: float = 14, h: float = 6, on: bool = True
    ) -> None:
        """Draw a box around a centre; ``on`` if the token uses it."""
        patch = FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.9",
            facecolor=PALE if on else GREY, edgecolor=BLUE if on else LINE, linewidth=1,
        )  # fmt: skip
        self.axes.add_patch(patch)
        self.text(x, y, text, 7.5, on)

    def arrow(self, start: Point, end: Point, on: bool = True, label: str = "") -> None:
        """Draw an arrow, with a label at its middle."""
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=7,
                shrinkA=0,
                shrinkB=0,
                color=BLUE if on else LINE,
                linewidth=1.2 if on else 0.7,
            )
        )
        if label:
            self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2.2, label, 7, on)

    def bars(self, x: float, y: float, values: Sequence[float], on: Sequence[int]) -> None:
        """Draw values as a row of small columns that stand on ``y``, centred on ``x``."""
        left = x - len(values) * 0.9
        for n, value in enumerate(values):
            color = BLUE if n in on else LINE
            self.axes.bar(left + 1.8 * n + 0.9, value, 1.3, y, color=color)

    def ends(self, y: float) -> None:
        """Draw the token on the left and the sum and output on the right, at one height."""
        self.box(5, y, "x", w=6)
        self.axes.add_patch(matplotlib.patches.Circle((87, y), 2.2, fc="white", ec=BLUE, lw=1))
        self.text(87, y, "+", 9)
        self.arrow((89.2, y), (93, y))
        self.text(95.5, y, "y", 9)
