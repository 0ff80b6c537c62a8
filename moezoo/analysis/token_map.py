"""Pictures of specialisation: which slots a token chooses, and which slots follow each other.

Colours are ratios: red where a token chooses a slot more than tokens do on average, blue where it
does less, in powers of two; grey is never. So a slot that everybody uses is no coloured column, and
layers with a few and with many slots look alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moezoo.analysis.specialization import information_terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TOKENS = 24
_MOST_SLOTS = 64
_MOST_PANELS = 6
_COLUMNS = 3
_COLOURS = "RdBu_r"
_NEVER = "0.8"
_LIMIT = 3  # powers of two that the colours span, in both directions
# Inches: a panel's width, a row of tokens, a square of slots, and what is written around a panel.
_WIDTH, _ROW, _SQUARE, _WRITING = 3.4, 0.145, 2.2, 0.75


class _Panel(NamedTuple):
    """One map of ``log2`` of ratios; rows and columns are named."""

    title: str
    ratio: np.ndarray
    rows: list[str]
    columns: list[int]
    row_label: str
    column_label: str


def draw_tokens(
    counts: Mapping[str, Tensor],
    tokens: Sequence[str],
    headings: Mapping[str, str],
    title: str,
) -> Figure:
    """Draw, layer by layer, how much more than others a token chooses each slot.

    The tokens are those that carry most of the layer's mutual information, ordered by the slot they
    choose most. With many layers, some are drawn, evenly spread.

    Args:
        counts: ``(V, N)`` how often each token chose each slot, by layer.
        tokens: V readable tokens.
        headings: a layer's title.
        title: of the whole picture.

    Returns:
        A figure to ``savefig``. No display is needed.
    """
    panels = []
    for name in _spread(list(counts), _MOST_PANELS):
        table = counts[name]
        terms = information_terms(table)
        rows, columns = _telling_rows(table, terms), _telling(terms.sum(dim=0))
        texts = [f"'{tokens[row]}'" for row in rows.tolist()]
        label = _slots_label(len(columns), table.shape[1])
        shown = _ratios(table, rows, columns)
        panels.append(_Panel(headings[name], shown, texts, columns.tolist(), "", label))
    height = _ROW * max(len(panel.rows) for panel in panels)
    return _draw(
        panels,
        max(height, 0.8),
        title,
        "the token's share of the slot's choices over its share of all choices",
    )


def draw_paths(
    tables: Mapping[tuple[str, str], Tensor], headings: Mapping[tuple[str, str], str], title: str
) -> Figure:
    """Draw, for layers that follow each other, where the tokens of each slot go next.

    Args:
        tables: ``(N_a, N_b)`` counts by the names of two layers.
        headings: titles of the same.
        title: of the whole picture.
    """
    panels = []
    for pair in _spread(list(tables), _MOST_PANELS):
        table = tables[pair]
        terms = information_terms(table)
        rows, columns = _telling(terms.sum(dim=1)), _telling(terms.sum(dim=0))
        shown = _ratios(table, rows, columns)
        labels = (
            f"{pair[0]}: {_slots_label(len(rows), len(table))}",
            f"{pair[1]}: {_slots_label(len(columns), table.shape[1])}",
        )
        names = [str(row) for row in rows.tolist()]
        panels.append(_Panel(headings[pair], shown, names, columns.tolist(), *labels))
    return _draw(
        panels,
        _SQUARE,
        title,
        "tokens that go this way, over those that would if the layers knew nothing of each other",
    )


def drawable(text: str) -> str:
    """Write characters that the font lacks by their number, and no formulas."""
    from matplotlib.font_manager import findfont, get_font

    font: Any = get_font(findfont("DejaVu Sans"))
    written = (c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)
    return "".join(written).replace("$", r"\$")


def _spread(names: list[Any], most: int) -> list[Any]:
    """Return at most so many, evenly spread, the first and the last among them."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _telling_rows(table_VN: Tensor, terms_VN: Tensor) -> Tensor:
    """Return the tokens that carry most information, ordered by the slot that says most of them."""
    carried_V = terms_VN.sum(dim=1)
    rows = carried_V.topk(min(_MOST_TOKENS, len(carried_V))).indices
    rows = rows[table_VN[rows].sum(dim=1) > 0]
    favourite = terms_VN[rows].argmax(dim=1).numpy()
    order = np.lexsort((-terms_VN[rows].amax(dim=1).numpy(), favourite))
    return rows[torch.from_numpy(order)]


def _telling(carried: Tensor) -> Tensor:
    """Return the slots that carry most information, in their order."""
    return carried.topk(min(_MOST_SLOTS, len(carried))).indices.sort().values


def _ratios(table: Tensor, rows: Tensor, columns: Tensor) -> np.ndarray:
    """Return ``log2(p(x, y) / (p(x) p(y)))``: minus infinity where never."""
    counts = table.double()
    expected = counts.sum(dim=1, keepdim=True)[rows] * counts.sum(dim=0)[columns] / counts.sum()
    ratio = counts[rows][:, columns] / expected.clamp(min=1e-300)
    return ratio.log2().masked_fill(expected == 0, -torch.inf).numpy()


def _slots_label(shown: int, slots: int) -> str:
    return "slot" if shown == slots else f"the {shown} most telling of {slots:,} slots"


def _draw(panels: list[_Panel], height: float, title: str, scale: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(panels) == 4 else min(len(panels), _COLUMNS)
    lines = math.ceil(len(panels) / columns)
    size = (max(_WIDTH * columns, 5.0), (height + _WRITING) * lines + 1.1)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    grid = figure.add_gridspec(
        lines + 1, columns, height_ratios=[*[height + _WRITING] * lines, 0.1]
    )
    image: Any = None
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        image = _draw_panel(axes, panel)
    cell = figure.add_subplot(grid[-1, :])
    bar = figure.colorbar(image, cax=cell, orientation="horizontal", extend="both")
    ticks = range(-_LIMIT, _LIMIT + 1)
    bar.set_ticks(ticks, labels=[f"{2**t}" if t >= 0 else f"1/{2**-t}" for t in ticks])
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.set_xlabel(f"{scale} (grey: never)", fontsize=8)
    return figure


def _draw_panel(axes: Any, panel: _Panel) -> Any:
    from matplotlib import colormaps

    image = axes.imshow(
        np.ma.masked_invalid(panel.ratio),
        cmap=colormaps[_COLOURS].with_extremes(bad=_NEVER),
        vmin=-_LIMIT,
        vmax=_LIMIT,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(panel.title, fontsize=8)
    axes.set_xlabel(panel.column_label, fontsize=8)
    axes.set_ylabel(panel.row_label, fontsize=8)
    axes.tick_params(labelsize=6.5, length=2)
    texts = [drawable(text) for text in panel.rows]
    places = range(len(texts)) if len(texts) <= _MOST_TOKENS else range(0, len(texts), 8)
    axes.set_yticks(list(places), [texts[place] for place in places])
    step = math.ceil(len(panel.columns) / 16)
    ticks = range(0, len(panel.columns), step)
    names = [str(panel.columns[tick]) for tick in ticks]
    narrow = max((len(name) for name in names), default=0) * len(names) > 32
    axes.set_xticks(list(ticks), names, rotation=90 if narrow else 0)
    return image
