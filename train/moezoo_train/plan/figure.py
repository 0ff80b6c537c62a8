"""A run's memory, time and speed against the number of GPUs, for each layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moezoo.command.tables import count
from moezoo_train.measure.writing import save_figure
from moezoo_train.plan.estimate import SCALE, Estimate, Planner
from moezoo_train.plan.machine import GIB

# Wong's colours, which the colour-blind can tell apart; lines that may coincide differ in dashes.
_LOOKS: dict[str, tuple[str, Any]] = {
    "ddp": ("#0072B2", "-"),
    "fsdp": ("#D55E00", "-"),
    "zero1": ("#56B4E9", (0, (6, 2))),
    "zero2": ("#009E73", (0, (4, 2))),
    "zero3": ("#E69F00", (0, (2, 2))),
    "ep": ("#CC79A7", (0, (7, 2, 1.5, 2))),
}
_GREY = "#666666"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def draw(folder: Path, planner: Planner, layouts: Sequence[str], gpus: int) -> list[Path]:
    """Write ``plan.png`` and ``plan.svg``, each whole or not at all; return their paths."""
    with matplotlib.rc_context(_STYLE):
        figure = costs(planner, layouts, gpus)
        paths = [folder / "plan.png", folder / "plan.svg"]
        for path in paths:
            save_figure(path, figure, dpi=160)
    return paths


def costs(planner: Planner, layouts: Sequence[str], gpus: int) -> Figure:
    """Draw three panels over the number of GPUs, all axes logarithmic.

    Memory of a GPU and the bounds on a step's time with the configured batch on every GPU; and
    tokens per second, beside that with the global batch held at that of ``gpus`` GPUs.
    """
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    memory, time, speed = (_axes(panel) for panel in figure.subplots(1, 3))
    steady = {layout: planner.scale(layout) for layout in layouts}
    held = {layout: planner.scale(layout, global_batch_of=gpus) for layout in layouts}
    _lines(memory, steady, lambda one: one.plan.memory().total / GIB)
    _lines(time, steady, lambda one: one.bounds.network)
    _lines(time, steady, lambda one: one.bounds.memory, thin=True)
    _lines(speed, steady, lambda one: one.tokens_per_second)
    _lines(speed, held, lambda one: one.tokens_per_second, thin=True)
    room = planner.machine.memory / GIB
    _level(memory, room, f"{planner.machine.name}: {room:.4g} GiB")
    _level(time, next(iter(steady.values()))[0].bounds.compute, "matrix products")
    for axes in (memory, time):  # flat lines need room to be told apart
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / 1.5, max(1.5 * top, 20 * bottom))
    _describe(memory, "Memory of a GPU", "GiB")
    _describe(time, "A step takes at least: network, thin: own memory", "seconds")
    _describe(speed, f"Tokens/s at most; thin: the batch of {gpus} GPUs", "tokens/s")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    setup = planner.setup
    parameters = count(sum(p.numel() for p in setup.parameters))
    figure.supxlabel(
        f"{parameters} parameters, {setup.precision.name}, {setup.batch_size} × "
        f"{setup.sequence_length} tokens per GPU and micro-batch, {setup.accumulation} per step. "
        "By formula: data-sheet peaks, perfect overlap, no latency.",
        x=0.01,
        ha="left",
        fontsize=7,
        color=_GREY,
    )
    return figure


def _axes(axes: Axes) -> Axes:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, SCALE[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return axes


def _lines(
    axes: Axes,
    scaled: dict[str, list[Estimate]],
    value: Callable[[Estimate], float],
    thin: bool = False,
) -> None:
    for layout, estimates in scaled.items():
        color, dashes = _LOOKS[layout]
        points = [(one.plan.gpus, value(one)) for one in estimates]
        shown = [point for point in points if point[1] > 0]  # one GPU sends nothing
        axes.plot(
            [gpus for gpus, _ in shown],
            [height for _, height in shown],
            color=color,
            linestyle=dashes,
            lw=0.9 if thin else 1.8,
            alpha=0.75 if thin else 1.0,
            label=_name(layout, estimates),
        )


def _level(axes: Axes, height: float, text: str) -> None:
    axes.axhline(height, color="black", lw=0.9)
    axes.annotate(
        text,
        (SCALE[-1], height),
        xytext=(-2, 4),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def _name(layout: str, estimates: Sequence[Estimate]) -> str:
    if layout != "ep":
        return layout
    degrees = sorted({one.plan.expert_parallel for one in estimates})
    return f"ep {degrees[0]}" if len(degrees) == 1 else f"ep {degrees[0]}–{degrees[-1]}"


def _describe(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("GPUs")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3, which="both")
