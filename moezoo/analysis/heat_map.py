"""A picture of the load: each slot's share of the weight, layer by layer.

White is the even share, blue less, red more, in powers of two; grey was never used. Layers with as
many slots of a kind are the rows of one map. The slots of product keys are a map of their own, the
first half-key against the second, where a half-key that wins everything shows as a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from moezoo.analysis.usage import SlotUsage, usage_of
from moezoo.routing.stats import SlotLoad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By the number of product-key maps side by side: width of the picture, height of a map, in inches.
_SIZES = {1: (5.0, 3.6), 2: (7.0, 2.6), 3: (9.0, 2.0)}
_MOST_CELLS = 256  # of a row; more slots share cells
_MOST_SQUARE = 128  # cells of a grid's side
_MOST_NUMBERS = 16  # with more cells in a row, they are too narrow for a number
_WRITING = 0.75  # inches, around a map
_SCALE = 0.1  # inches, the colours' explanation
_DEAD = "0.35"


class _Panel(NamedTuple):
    """Layers that are drawn as one map; a grid is one layer."""

    names: list[str]
    loads: list[SlotLoad]
    usages: list[SlotUsage]

    @property
    def is_grid(self) -> bool:
        return len(self.loads[0].shape) == 2


def draw_usage(loads: Mapping[str, SlotLoad], title: str) -> Figure:
    """Draw the share of every slot.

    Args:
        loads: of each layer, by the name that it gets in the picture.
        title: of the whole picture.

    Returns:
        A figure to ``savefig``. No display is needed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(loads)
    columns = min(len(panels), 3) if all(panel.is_grid for panel in panels) else 3
    width, side = _SIZES[columns]
    lines = _lines(panels, columns)
    # Of the maps themselves, without what is written around them.
    heights = [side if line[0].is_grid else 0.32 * len(line[0].loads) for line in lines]
    heights.append(_SCALE)
    size = (width, sum(heights) + _WRITING * len(heights) + 0.2)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    cells = {name: _cells(load) for name, load in loads.items()}
    limit = _limit(list(cells.values()))
    image = None
    for row, line in enumerate(lines):
        for column, panel in enumerate(line):
            axes = figure.add_subplot(grid[row, column] if panel.is_grid else grid[row, :])
            image = _draw_panel(axes, panel, np.concatenate([cells[n] for n in panel.names]), limit)
    _draw_scale(figure, figure.add_subplot(grid[-1, :]), image, limit)
    return figure


def _panels(loads: Mapping[str, SlotLoad]) -> list[_Panel]:
    """Group layers with the same slots, but every grid by itself."""
    groups: dict[Any, list[str]] = {}
    for name, load in loads.items():
        key = name if len(load.shape) == 2 else (load.kind, load.shape)
        groups.setdefault(key, []).append(name)
    panels = []
    for names in groups.values():
        members = [loads[name] for name in names]
        panels.append(_Panel(names, members, [usage_of(load) for load in members]))
    return panels


def _lines(panels: list[_Panel], columns: int) -> list[list[_Panel]]:
    """Return a line for each map, and a common one for several grids."""
    grids = [panel for panel in panels if panel.is_grid]
    lines = [[panel] for panel in panels if not panel.is_grid]
    return lines + [grids[i : i + columns] for i in range(0, len(grids), columns)]


def _cells(load: SlotLoad) -> np.ndarray:
    """Return ``log2(share / even share)``, minus infinity where there is none, in cells to draw."""
    share = load.mass.double().reshape(load.shape)
    relative = share * share.numel() / share.sum().clamp(min=1e-300)
    if relative.ndim == 1:
        cells = _averaged(relative[None], 1, _MOST_CELLS)
    else:
        cells = _averaged(relative, _MOST_SQUARE, _MOST_SQUARE)
    with np.errstate(divide="ignore"):
        return np.log2(cells)


def _averaged(values: Tensor, most_rows: int, most_columns: int) -> np.ndarray:
    """Average blocks so that no more rows and columns remain; the last block may be smaller."""
    array = values.numpy()
    for axis, most in enumerate((most_rows, most_columns)):
        size = array.shape[axis]
        step = math.ceil(size / most)
        starts = np.arange(0, size, step)
        lengths = np.diff(np.append(starts, size))
        shape = (-1, 1) if axis == 0 else (1, -1)
        array = np.add.reduceat(array, starts, axis=axis) / lengths.reshape(shape)
    return array


def _limit(cells: list[np.ndarray]) -> int:
    """Choose the powers of two that the colours span: 95 % of the used cells, 2 to 16 fold."""
    used = np.concatenate([np.abs(c[np.isfinite(c)]).ravel() for c in cells] or [np.zeros(1)])
    return int(np.clip(np.ceil(np.quantile(used, 0.95)) if used.size else 1, 1, 4))


def _draw_panel(axes: Any, panel: _Panel, values: np.ndarray, limit: int) -> Any:
    from matplotlib import colormaps

    colours = colormaps["RdBu_r"].with_extremes(bad=_DEAD)
    load = panel.loads[0]
    rows, columns = load.shape if panel.is_grid else (len(values), load.counts.numel())
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )
    axes.tick_params(labelsize=7, length=2)
    if panel.is_grid:
        _label_grid(axes, panel)
    else:
        _label_rows(axes, panel, values)
    return image


def _label_grid(axes: Any, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    load, usage = panel.loads[0], panel.usages[0].by_weight
    tree = load.kind == "leaves"
    axes.set_box_aspect(1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(
        f"{panel.names[0]}: {load.counts.numel():,} {load.kind}\n{_figures(usage)}", fontsize=8
    )
    axes.set_ylabel("tree" if tree else "first half-key", fontsize=8)
    together = math.ceil(load.shape[1] / _MOST_SQUARE)
    cell = f" ({together} per cell)" if together > 1 else ""
    axes.set_xlabel(("leaf" if tree else "second half-key") + cell, fontsize=8)


def _label_rows(axes: Any, panel: _Panel, values: np.ndarray) -> None:
    count, kind = panel.loads[0].counts.numel(), panel.loads[0].kind
    axes.set_title(f"{count:,} {kind}", fontsize=8)
    axes.set_xlabel(kind.removesuffix("s").replace("leave", "leaf"), fontsize=8)
    axes.set_yticks(range(len(panel.names)), panel.names, fontsize=7)
    if count <= _MOST_NUMBERS:
        axes.set_xticks(range(count))
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(panel.names)), [_figures(u.by_weight) for u in panel.usages])
    right.tick_params(labelsize=7, length=0)
    for edge in range(1, len(values)):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
    if count <= _MOST_NUMBERS:
        _write_numbers(axes, values)


def _write_numbers(axes: Any, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        text = f"{2.0**value:.2f}" if np.isfinite(value) else "never"
        dark = not np.isfinite(value) or abs(value) > 0.55 * axes.images[0].get_clim()[1]
        colour = "white" if dark else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _figures(evenness: Any) -> str:
    return f"usage {_percent(evenness.usage)}, KL {evenness.unevenness:.2f} nats"


def _percent(share: float) -> str:
    """Write a share so that only all of it is 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.3g} %"


def _draw_scale(figure: Any, axes: Any, image: Any, limit: int) -> None:
    bar = figure.colorbar(image, cax=axes, orientation="horizontal", extend="both")
    ticks = range(-limit, limit + 1)
    bar.set_ticks(ticks, labels=[f"{2**t}" if t >= 0 else f"1/{2**-t}" for t in ticks])
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("share of the weight over an even share (grey: never used)", fontsize=8)
