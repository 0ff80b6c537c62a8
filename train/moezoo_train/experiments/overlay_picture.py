"""Losses of several runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moezoo_train.experiments.common.palette import GREY, LINES, MARKS
from moezoo_train.measure.report import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY = 25
"""More points than these have no marks."""


@dataclass(frozen=True)
class Series:
    """A loss as it was logged, every array ``(points,)``.

    Attributes:
        tokens: trained on so far.
        flops: operations of training so far; None if they were not recorded.
        seconds: of training so far.
        loss: nats per token.
    """

    tokens: NDArray[Any]
    flops: NDArray[Any] | None
    seconds: NDArray[Any]
    loss: NDArray[Any]

    def lists(self) -> dict[str, list[float] | None]:
        """Return it as JSON holds it."""
        arrays = {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        return {name: None if each is None else each.tolist() for name, each in arrays.items()}


def draw_runs(runs: Sequence[tuple[str, Series, Series]]) -> Figure:
    """Draw each run's training loss, smoothed, and its validation loss, over what they took.

    Args:
        runs: name, training loss and validation loss of each.
    """
    from matplotlib.figure import Figure

    axes_of = ["tokens", "seconds"]
    if any(train.flops is not None or val.flops is not None for _, train, val in runs):
        axes_of.insert(1, "flops")
    figure = Figure(figsize=(4.2 * len(axes_of) + 0.4, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    handles = []
    for axes, kind in zip(panels, axes_of, strict=True):
        unit, label = _unit(kind, runs)
        for number, (name, train, val) in enumerate(runs):
            color = LINES[number % len(LINES)]
            handles.append(_draw(axes, kind, unit, train, color, "-", None, name))
            _draw(axes, kind, unit, val, color, (0, (4, 2)), MARKS[number % len(MARKS)], name)
        axes.set_xlabel(label, fontsize=8.5)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if (shown := _range(runs)) is not None:
        panels[0].set_ylim(*shown)
    panels[0].set_ylabel("loss (nats per token)", fontsize=8.5)
    figure.legend(
        handles[: len(runs)],
        [name for name, _, _ in runs],
        loc="outside upper center",
        ncols=max(1, min(len(runs), 10 // max(1, max(len(n) for n, _, _ in runs) // 12))),
        frameon=False,
        fontsize=8,
    )
    figure.supxlabel(
        "Solid: training, smoothed. Dashed: validation. Higher losses at the start are cut off.",
        fontsize=7,
        color=GREY,
    )
    return figure


def _draw(
    axes: Any,
    kind: str,
    unit: float,
    series: Series,
    color: str,
    style: Any,
    mark: str | None,
    name: str,
) -> Any:
    """Draw one loss; a single point has a mark, as it would not be seen otherwise."""
    places = getattr(series, kind)
    if places is None:
        places = np.zeros(0)
    loss = series.loss if mark is not None else np.array(smoothed(series.loss.tolist()))
    if len(places) == 1 or (mark is not None and len(places) <= _MANY):
        mark = mark or "."
    else:
        mark = None
    (line,) = axes.plot(
        places / unit,
        loss[: len(places)],
        color=color,
        linestyle=style,
        linewidth=1.3,
        marker=mark,
        markersize=4.5 if mark != "." else 8,
        label=name,
    )
    return line


def _unit(kind: str, runs: Sequence[tuple[str, Series, Series]]) -> tuple[float, str]:
    """Return the unit of an axis, and what it is called."""
    found = [getattr(series, kind) for _, *both in runs for series in both]
    largest = max((float(each[-1]) for each in found if each is not None and len(each)), default=1)
    if kind == "seconds":
        names = {1.0: "s", 60.0: "min", 3600.0: "h"}
        unit = next((u for u in (3600.0, 60.0) if largest >= 2 * u), 1.0)
        return unit, f"training time ({names[unit]})"
    if kind == "flops":
        exponent = 3 * int(np.log10(max(largest, 1)) // 3)
        return 10.0**exponent, f"training FLOPs ($10^{{{exponent}}}$)"
    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))
    unit, name = next(((u, n) for u, n in units if largest >= u), (1.0, ""))
    return unit, f"{name}tokens"


def _range(runs: Sequence[tuple[str, Series, Series]]) -> tuple[float, float] | None:
    """Return the losses that tell runs apart: all behind the first quarter of each."""
    late = [
        float(loss)
        for _, *both in runs
        for series in both
        for tokens, loss in zip(series.tokens, series.loss, strict=True)
        if tokens >= series.tokens[-1] / 4
    ]
    if len(late) < 3:
        return None
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin
