"""Pictures by layer: how sparse activations are, and how evenly neurons share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moezoo.analysis.sparsity import Sparsity
from moezoo.analysis.spectrum import Spectrum
from moezoo.analysis.triggers import Agreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_POINTS = 512
_LEAST = 1e-5  # shares below are drawn at the bottom


def _new_figure(width: float, height: float, title: str) -> Figure:
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
    figure = _new_figure(10.0, _height(len(summaries)), title)
    shares, curves = figure.subplots(1, 2)
    _draw_shares(shares, summaries, [headings[name] for name in summaries])
    _draw_ranked(curves, frequencies, _LEAST)
    curves.set_ylim(_LEAST, 1.5)
    curves.set_xlabel("neurons of the layer, the busiest first (%)", fontsize=8)
    curves.set_ylabel("share of the tokens for which it is strong", fontsize=8)
    return figure


def draw_agreement(
    agreements: Mapping[str, Agreement],
    strengths: Mapping[str, Tensor],
    headings: Mapping[str, str],
    title: str,
) -> Figure:
    """Draw how often neurons say what follows their trigger, and how much each writes.

    Args:
        agreements: by the name of a set of neurons.
        strengths: ``(N,)`` coefficient at the strongest trigger times the length of the value.
        headings: what is written for a name.
        title: of the whole picture.
    """
    figure = _new_figure(10.0, _height(len(agreements)), title)
    bars, curves = figure.subplots(1, 2)
    rows = np.arange(len(agreements))
    agree = [100 * one.agree for one in agreements.values()]
    bars.barh(rows, agree, height=0.7, color="#3182bd", label="agree")
    chance = [100 * one.by_chance for one in agreements.values()]
    bars.plot(
        chance, rows, "|", color="#d62728", markersize=9, markeredgewidth=2, label="by chance"
    )
    bars.set_yticks(rows, [headings[name] for name in agreements], fontsize=7)
    bars.invert_yaxis()
    bars.set_xlim(left=0)
    bars.set_xlabel("neurons that say what follows their strongest trigger (%)", fontsize=8)
    bars.tick_params(labelsize=7)
    bars.legend(fontsize=6.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    most = max(float(strength.max()) for strength in strengths.values())
    _draw_ranked(curves, strengths, max(most, 1e-30) * _LEAST)
    curves.set_xlabel("neurons of the layer, the strongest first (%)", fontsize=8)
    curves.set_ylabel("coefficient × length of value", fontsize=8)
    return figure


def _height(rows: int) -> float:
    return max(2.8, 0.26 * rows + 1.2)


def _draw_ranked(axes: Any, values: Mapping[str, Tensor], least: float) -> None:
    """Draw a curve per layer, from the largest value to the smallest."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.92, len(values)))
    for (name, value), colour in zip(values.items(), colours, strict=True):
        place, height = ranked(value)
        axes.plot(place, height.clip(min=least), color=colour, label=name, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    columns = 1 if len(values) <= 14 else 2
    axes.legend(fontsize=6.5, ncols=columns, loc="upper left", bbox_to_anchor=(1, 1))


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


def draw_spectra(
    spectra: Mapping[str, tuple[Spectrum, Tensor]], headings: Mapping[str, str], title: str
) -> Figure:
    """Draw the ranks over the width, and how the variance adds up over directions.

    Args:
        spectra: summary and shares ``(D,)`` of the variance, descending, by the name of a layer.
        headings: what is written for a name.
        title: of the whole picture.
    """
    from matplotlib import colormaps

    figure = _new_figure(10.0, _height(len(spectra)), title)
    bars, curves = figure.subplots(1, 2)
    rows = np.arange(len(spectra))
    for kind, colour in (("soft_rank", "#9ecae1"), ("hard_rank", "#3182bd")):
        share = [100 * getattr(one, kind) / one.width for one, _ in spectra.values()]
        bars.barh(rows, share, height=0.75, color=colour, label=kind.replace("_", " "))
    bars.set_yticks(rows, [headings[name] for name in spectra], fontsize=7)
    bars.invert_yaxis()
    bars.set_xlim(left=0)
    bars.set_xlabel("rank over width (%)", fontsize=8)
    bars.tick_params(labelsize=7)
    bars.legend(fontsize=6.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(spectra)))
    for (name, (_, share_D)), colour in zip(spectra.items(), colours, strict=True):
        place = 100 * np.arange(1, len(share_D) + 1) / len(share_D)
        total = 100 * share_D.double().cumsum(0).numpy()
        curves.plot(place, total, color=colour, label=name, linewidth=1.3)
    first = 100 / max(len(share_D) for _, share_D in spectra.values())
    even = np.geomspace(min(first, 99.0), 100, 50)
    curves.plot(even, even, color="0.6", linewidth=0.8, linestyle=":", label="even")
    # The strongest directions hold nearly all, so they get room.
    curves.set_xscale("log")
    curves.set_xlim(even[0], 100)
    curves.xaxis.set_major_formatter("{x:g}")
    curves.set_ylim(0, 101)
    curves.set_xlabel("directions, the strongest first (%)", fontsize=8)
    curves.set_ylabel("share of the variance (%)", fontsize=8)
    curves.tick_params(labelsize=7)
    curves.grid(alpha=0.25)
    curves.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_frontier(curves: Mapping[str, Sequence[tuple[float, float, float]]], title: str) -> Figure:
    """Draw a curve per method: the work that is left, and what that costs.

    Args:
        curves: by a method's name, its points: share of the work, ratio of perplexities, and the
            ratio's standard error.
        title: of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _new_figure(6.5, 4.2, title)
    axes = figure.subplots()
    colours = colormaps["tab10"](np.arange(10))
    for i, (name, points) in enumerate(curves.items()):
        work, ratio, error = (np.array(each) for each in zip(*sorted(points), strict=True))
        axes.errorbar(
            100 * work,
            ratio,
            yerr=error,
            color=colours[i % 10],
            label=name,
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            capsize=2,
        )
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # Most ratios are near one, where a decade's own ticks say nothing.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("feed-forward products that are left (%)", fontsize=8)
    axes.set_ylabel("perplexity over the dense model's", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=7)
    return figure


def draw_blocks(figures: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw how alike tokens are around each block, and how much its parts add to them.

    Args:
        figures: a number per block of each of ``cosine_before``, ``cosine_attended``,
            ``cosine_after``, ``attention`` and ``feed_forward``.
        title: of the whole picture.
    """
    figure = _new_figure(10.0, 3.6, title)
    cosines, shares = figure.subplots(1, 2)
    before, after = (np.array(figures[f"cosine_{when}"]) for when in ("before", "after"))
    layers = np.arange(len(before))
    # A block ends where the next begins: one line through all, with attention's answers between.
    cosines.plot(np.arange(len(before) + 1), [*before, after[-1]], color="#3182bd", label="stream")
    cosines.plot(
        layers + 0.5, figures["cosine_attended"], "o", color="#d62728", label="after attention"
    )
    cosines.set_xlabel("blocks passed", fontsize=8)
    cosines.set_ylabel("mean cosine of two tokens", fontsize=8)
    for place, (key, colour) in enumerate((("attention", "#d62728"), ("feed_forward", "#3182bd"))):
        heights = [100 * share for share in figures[key]]
        label = key.replace("_", "-")
        shares.bar(layers + 0.4 * (place - 0.5), heights, width=0.4, color=colour, label=label)
    shares.set_xlabel("layer", fontsize=8)
    shares.set_ylabel("length of what it adds over the stream's (%)", fontsize=8)
    for axes in (cosines, shares):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    return figure
