"""Pictures with a panel or a label per method: learning curves, parameters, and load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moezoo.command.tables import count
from moezoo_train.experiments.common.palette import GREY
from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.compare.curves import Curve, focus
from moezoo_train.experiments.compare.results import Row
from moezoo_train.experiments.compare.row_colors import colors, families

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5
WIDTH = 6.5
"""Inches that a caption needs."""
QUIET = "#555555"
MEASURES = {
    "evenness": "evenness of the load",
    "usage": "share used in a batch",
    "busiest": "busiest ÷ mean",
    "unevenness": "unevenness (nats)",
}


def compute(rows: Sequence[Row], curves: Sequence[Curve], baseline: str, caption: str) -> Figure:
    """Draw training loss over training compute, a panel per method, its ablation dashed.

    Args:
        rows: best first.
        curves: of any of them; bands are standard errors.
        baseline: name of the row whose curve is in every panel.
        caption: under the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    by_run = {(curve.row, curve.random): curve for curve in curves}
    names = [row.name for row in rows if (row.name, False) in by_run]
    shown = [name for name in names if name != baseline] or names
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = (max(WIDTH, 1.85 * columns + 0.7), 1.45 * lines + 1.1)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    last = max(point.flops for curve in curves for point in curve.points)
    power = 3 * (int(math.log10(last)) // 3)
    palette = colors(rows, baseline)
    for place, axes in enumerate(panels.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        name = shown[place]
        if name != baseline:
            _curve(axes, by_run.get((baseline, False)), power, GREY, "-", 1.0)
        _curve(axes, by_run.get((name, True)), power, palette[name], (0, (3, 1.5)), 1.2)
        _curve(axes, by_run[name, False], power, palette[name], "-", 1.6)
        axes.set_title(name, fontsize=7.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=6.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        # A panel with none below it labels its own axis.
        axes.tick_params(labelbottom=place + columns >= len(shown))
    panels[0, 0].set_ylim(focus(curves))
    panels[0, 0].set_xlim(0, last / 10**power)
    figure.supylabel("training loss (nats per token)", fontsize=8)
    unit = f"10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))} FLOPs"
    figure.supxlabel(
        f"training compute ({unit}: 3 × active forward FLOPs × tokens)\n{caption}",
        fontsize=7,
        color=QUIET,
    )
    _key(figure, baseline)
    return figure


def _curve(
    axes: Any, curve: Curve | None, power: int, color: str, style: Any, width: float
) -> None:
    if curve is None:
        return
    flops = [point.flops / 10**power for point in curve.points]
    loss = [point.loss for point in curve.points]
    axes.plot(flops, loss, color=color, linestyle=style, linewidth=width)
    errors = [point.error for point in curve.points]
    if all(error is not None for error in errors):
        low = [value - (error or 0.0) for value, error in zip(loss, errors, strict=True)]
        high = [value + (error or 0.0) for value, error in zip(loss, errors, strict=True)]
        axes.fill_between(flops, low, high, color=color, alpha=0.2, linewidth=0)


def _key(figure: Figure, baseline: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="black", linewidth=1.6, label="method"),
        Line2D([], [], color="black", ls=(0, (3, 1.5)), linewidth=1.2, label="random routing"),
        Line2D([], [], color=GREY, linewidth=1.0, label=f"{baseline}, the baseline"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=7.5)


def parameters(rows: Sequence[Row], baseline: str, caption: str) -> Figure:
    """Draw validation loss over the parameters of the whole model, with a name for every dot.

    Args:
        rows: those without a loss are left out.
        baseline: name of the row that is grey.
        caption: under the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    shown = [(row, row.loss) for row in rows if row.loss]
    height = max(3.4, 1.2 + 0.17 * len(shown))
    figure = Figure(figsize=(7, height), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    palette = colors(rows, baseline)
    for row, loss in shown:
        axes.errorbar(
            row.total_parameters or 0,
            loss.value,
            yerr=loss.error,
            fmt="o",
            color=palette[row.name],
            markersize=4.5,
            capsize=2,
            linewidth=1,
            zorder=3,
        )
    values = [row.total_parameters or 0 for row, _ in shown]
    if max(values) > 4 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.1, 1.1 * max(values))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        # Never so narrow that sizes which are all but equal look far apart.
        low, high = min(*values, 0.9 * max(values)), max(*values, min(values) / 0.9)
        axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
    ends = [loss.value + sign * (loss.error or 0) for _, loss in shown for sign in (1, -1)]
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    _names(axes, [(row, loss.value) for row, loss in shown], palette, height)
    axes.set_xlabel("parameters of the model", fontsize=9)
    axes.set_ylabel("validation loss (nats per token)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _families(figure, rows, [row for row, _ in shown], baseline)
    figure.supxlabel(caption, fontsize=7, color=QUIET)
    return figure


def _names(
    axes: Any, shown: Sequence[tuple[Row, float]], palette: Mapping[str, Any], height: float
) -> None:
    """Write the names in a column beside the axes, each with a thin line to its dot."""
    low, high = axes.get_ylim()
    order = sorted(shown, key=lambda item: item[1])
    # 0.16 inches a line of text; about an inch of the figure is not the axes'.
    gap = (high - low) * 0.16 / (height - 1.0)
    places = spread([value for _, value in order], gap, low, high)
    leader = {"arrowstyle": "-", "color": "#cccccc", "lw": 0.6, "relpos": (0, 0.5), "shrinkB": 3}
    for (row, value), place in zip(order, places, strict=True):
        axes.annotate(
            row.name if row.causal else f"{row.name} (not causal)",
            (row.total_parameters, value),
            (1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            color=palette[row.name],
            arrowprops=leader,
            annotation_clip=False,
        )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted values apart to a distance of at least ``gap``, within a range if they fit.

    Groups that touch move as one, so that each stays centred on its members' own places.
    """
    groups: list[tuple[float, int]] = []  # middle, members

    def inside(middle: float, members: int) -> float:
        half = gap * (members - 1) / 2
        return max(low + half, min(high - half, middle)) if 2 * half < high - low else middle

    for value in values:
        middle, members = inside(value, 1), 1
        while groups and middle - groups[-1][0] < gap * (members + groups[-1][1]) / 2:
            other, more = groups.pop()
            middle = (middle * members + other * more) / (members + more)
            members += more
            middle = inside(middle, members)
        groups.append((middle, members))
    return [
        middle + gap * (place - (members - 1) / 2)
        for middle, members in groups
        for place in range(members)
    ]


def load(
    rows: Sequence[Row],
    measures: Mapping[str, Mapping[str, Mean]],
    baseline: str,
    caption: str,
) -> Figure:
    """Draw how evenly methods used their experts, slots or neurons, a panel per measure.

    Args:
        rows: best first; those that count nothing are left out.
        measures: by row, then by name.
        baseline: name of the row that is grey.
        caption: under the picture.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.name in measures]
    kinds = [name for name in MEASURES if any(name in found for found in measures.values())]
    size = (max(WIDTH, 1.6 + 1.6 * len(kinds)), 1.1 + 0.24 * len(shown))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    palette = colors(rows, baseline)
    for axes, kind in zip(panels, kinds, strict=True):
        for place, row in enumerate(shown):
            value = measures[row.name].get(kind)
            if value is not None:
                axes.errorbar(
                    value.value,
                    place,
                    xerr=value.error,
                    fmt="o",
                    color=palette[row.name],
                    markersize=4.5,
                    capsize=2,
                    linewidth=1,
                )
        if kind in ("evenness", "usage"):
            axes.set_xlim(-0.05, 1.05)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        elif kind == "busiest":
            _times(axes)
        else:
            axes.set_xlim(left=0 if axes.get_xlim()[0] > 0 else None)
        axes.set_title(MEASURES[kind], fontsize=8, loc="left")
        axes.grid(axis="both", alpha=0.2)
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(shown)), [row.name for row in shown])
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    _families(figure, rows, shown, baseline)
    figure.supxlabel(caption, fontsize=7, color=QUIET)
    return figure


def _families(figure: Figure, rows: Sequence[Row], shown: Sequence[Row], baseline: str) -> None:
    """Add a legend of colours, where they are of families and not of rows, which have names."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker="o", ls="", markersize=4.5, label=name)
        for name, color in families(rows, shown, baseline).items()
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(7, len(handles)),
            frameon=False,
            fontsize=7.5,
            columnspacing=1.2,
            handletextpad=0.2,
        )


def _times(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.9, low), high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 100 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
