"""Pictures by layer: how sparse activations are, and how evenly neurons share the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moezoo.analysis.sparsity import Sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_POINTS = 512
_LEAST = 1e-5  # shares below are drawn at the bottom


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make a figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return figure


def draw_sparsity(
    summaries: Mapping[str, Sparsity],
    frequencies: Mapping[str, Tensor],
    headings: Mapping[str, str],
    title: str,
) -> Figure:
    """Draw the shares of each layer, and how often its neurons are strong, the busiest first.

    Args:
        summaries: by the name of a set of neurons.
        frequencies: ``(N,)`` share of the tokens for which each neuron is strong.
        headings: what is written for a name.
        title: of the whole picture.
    """
    from matplotlib import colormaps

    names = list(summaries)
    height = max(2.8, 0.26 * len(names) + 1.2)
    figure = new_figure(10.0, height, title)
    shares, curves = figure.subplots(1, 2)
    _draw_shares(shares, summaries, [headings[name] for name in names])
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    for name, colour in zip(names, colours, strict=True):
        place, frequency = ranked(frequencies[name])
        curves.plot(place, frequency.clip(min=_LEAST), color=colour, label=name, linewidth=1.3)
    curves.set_yscale("log")
    curves.set_ylim(_LEAST, 1.5)
    curves.set_xlim(0, 100)
    curves.set_xlabel("neurons of the layer, the busiest first (%)", fontsize=8)
    curves.set_ylabel("share of the tokens for which it is strong", fontsize=8)
    curves.tick_params(labelsize=7)
    curves.grid(alpha=0.25)
    columns = 1 if len(names) <= 14 else 2
    curves.legend(fontsize=6.5, ncols=columns, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_shares(axes: Any, summaries: Mapping[str, Sparsity], labels: list[str]) -> None:
    rows = np.arange(len(labels))
    kinds = (("computed", "0.85"), ("nonzero", "#9ecae1"), ("strong", "#3182bd"))
    for kind, colour in kinds:
        widths = [100 * getattr(summary, kind) for summary in summaries.values()]
        axes.barh(rows, widths, height=0.75, color=colour, label=kind)
    effective = [100 * summary.effective for summary in summaries.values()]
    axes.plot(effective, rows, "|", color="#d62728", markersize=9, markeredgewidth=2)
    axes.plot([], [], "|", color="#d62728", markeredgewidth=2, label="effective")
    axes.set_yticks(rows, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the layer's neurons, mean over tokens (%)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6.5, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def ranked(frequency_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sort from the largest, and thin out: places in per cent, values."""
    ordered = frequency_N.double().sort(descending=True).values.numpy()
    picked = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _MOST_POINTS)).round())
    place = 100 * (picked + 0.5) / len(ordered)
    return place, ordered[picked.astype(np.int64)]
