"""A run's memory, traffic and speed against the number of GPUs, for each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

BEST = "fsdp2, best options"
# Wong's colours, which the colour-blind can tell apart; lines that may coincide differ in dashes.
_LOOKS: dict[str, tuple[str, Any]] = {
    "ddp": ("#0072B2", "-"),
    "fsdp2": ("#D55E00", "-"),
    BEST: ("#CC79A7", (0, (7, 2, 1.5, 2))),
    "zero1": ("#56B4E9", (0, (6, 2))),
    "zero2": ("#009E73", (0, (4, 2))),
    "zero3": ("#E69F00", (0, (2, 2))),
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
_Lines = Mapping[str, Sequence[Estimate]]


def draw(folder: Path, planner: Planner, layouts: Sequence[str], gpus: int) -> list[Path]:
    """Write ``plan.png`` and ``plan.svg``, each whole or not at all; return their paths."""
    with matplotlib.rc_context(_STYLE):
        figure = costs(planner, layouts, gpus)
        paths = [folder / "plan.png", folder / "plan.svg"]
        for path in paths:
            save_figure(path, figure, dpi=160)
    return paths


def costs(planner: Planner, layouts: Sequence[str], gpus: int) -> Figure:
    """Draw four panels over the number of GPUs, all axes logarithmic.

    With the configured batch on every GPU: memory of a GPU, and the bound that the network sets to
    a step; tokens per second of a GPU, with that batch and with the global batch of ``gpus`` GPUs.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    memory, time, speed, strong = figure.subplots(2, 2).flatten().tolist()
    steady = _scaled(planner, layouts)
    held = _scaled(planner, layouts, global_batch_of=gpus)
    _draw(memory, steady, lambda one: one.plan.memory().total / GIB)
    room = planner.machine.memory / GIB
    _level(memory, room, f"{planner.machine.name}: {room:.4g} GiB")
    _draw(time, steady, lambda one: one.bounds.network)
    _level(time, next(iter(steady.values()))[0].bounds.compute, "matrix products")
    _draw(speed, steady, lambda one: one.tokens_per_second / one.plan.gpus)
    _draw(strong, held, lambda one: one.tokens_per_second / one.plan.gpus)
    _describe(memory, "Memory per GPU", "GiB")
    _describe(time, "Network time per step, lower bound", "seconds")
    _describe(speed, "Throughput, upper bound: fixed batch per GPU", "tokens/s per GPU")
    _describe(strong, f"Throughput, upper bound: fixed batch of {gpus} GPUs", "tokens/s per GPU")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    setup = planner.setup
    figure.supxlabel(
        f"{count(setup.size)} parameters, {setup.precision.name}, {setup.batch_size} × "
        f"{setup.sequence_length} tokens per GPU and micro-batch, {setup.accumulation} per step. "
        "By formula: data-sheet peaks, perfect overlap, no latency.",
        x=0.01,
        ha="left",
        fontsize=7,
        color=_GREY,
    )
    return figure


def _scaled(
    planner: Planner, layouts: Sequence[str], global_batch_of: int | None = None
) -> dict[str, list[Estimate]]:
    """Plan every line's layout on more and more GPUs."""
    found = {}
    for layout in layouts:
        if layout == "fsdp2" and not planner.fixed:
            found[layout] = planner.scale(layout, global_batch_of, plain=True)
            found[BEST] = planner.scale(layout, global_batch_of)
        else:
            found[layout] = planner.scale(layout, global_batch_of)
    return {name: estimates for name, estimates in found.items() if estimates}


def _draw(axes: Axes, scaled: _Lines, value: Callable[[Estimate], float]) -> None:
    """Draw a line per layout, with a mark where it has one point only."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, SCALE[-1])
    for name, estimates in scaled.items():
        color, dashes = _LOOKS[name]
        points = [(one.plan.gpus, value(one)) for one in estimates]
        shown = [point for point in points if point[1] > 0]  # one GPU sends nothing
        axes.plot(
            [gpus for gpus, _ in shown],
            [height for _, height in shown],
            color=color,
            linestyle=dashes,
            marker="o" if len(shown) == 1 else None,
            ms=4,
            lw=1.8,
            label=name,
        )
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 1.5, max(1.5 * top, 20 * bottom))  # room for flat lines
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.12g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _level(axes: Axes, height: float, text: str) -> None:
    """Draw what the lines are compared with, in reach of them."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, height / 1.5), max(top, 1.5 * height))
    line = axes.axhline(height, color="black", lw=0.9)
    axes.legend([line], [text], loc="best", fontsize=8, frameon=True, edgecolor="none")


def _describe(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("GPUs")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3, which="both")
