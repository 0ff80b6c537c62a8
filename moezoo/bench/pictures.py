"""Pictures of the results: ratios as bars, the roofline, and cost against size."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moezoo.atomic import atomic_write
from moezoo.bench.case import PLAIN
from moezoo.bench.limits import Limits
from moezoo.bench.results import QUICK, WHOLE, Row

# Wong's colours, which the colour-blind can tell apart.
_BLUE, _SKY, _ORANGE, _GREEN, _PINK, _RED, _YELLOW = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#C9B400",
)
_GREY = "#666666"
_LOOKS = [
    (color, marker)
    for marker in "osD^"
    for color in (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _YELLOW)
]
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "moezoo",
    "svg.fonttype": "path",
}
_BAR = 0.36
_NUMBER = 0.1  # the width of a number beside its bar, as a share of the axis, at most


def draw(
    folder: Path, rows: Sequence[Row], limits: Limits, environment: Mapping[str, Any]
) -> list[Path]:
    """Draw what there are measurements for; give the files that were written.

    Each picture is written as SVG and as PNG, whole or not at all.
    """
    measured = [row for row in rows if row.outcome == "measured"]
    compared = [row for row in measured if row.forward_ratio is not None]
    others = [row for row in compared if row.peer != PLAIN]
    written: list[Path] = []
    with matplotlib.rc_context(_STYLE):
        if others:
            written += _save(folder, "ratios", ratios(others), environment)
        # Selection has no FLOPs to speak of.
        counted = [row for row in measured if row.same_function and row.flops and row.bytes]
        if counted:
            written += _save(folder, "roofline", roofline(counted, limits), environment)
        if any(len(_steps(line)) > 1 for line in _series(compared).values()):
            written += _save(folder, "sizes", _sizes(compared), environment)
    return written


def _save(folder: Path, name: str, figure: Figure, environment: Mapping[str, Any]) -> list[Path]:
    FigureCanvasAgg(figure)
    threads = f"{environment['threads']} thread{'s' if environment['threads'] != 1 else ''}"
    text = (
        f"{environment['device']}, {threads}, torch {environment['torch']}, "
        f"moezoo {environment['moezoo']}, {str(environment['date'])[:10]}"
    )
    if environment.get("quick"):
        look: Any = {"fontsize": 8, "color": _RED, "weight": "bold"}
        if figure.legends:  # it stands where the figure's title would
            figure.axes[0].set_title(QUICK, loc="left", **look)
        else:
            figure.suptitle(QUICK, x=0.01, ha="left", **look)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=_GREY)
    paths = []
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        # Without a date in it, equal results give equal files.
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
        path = folder / f"{name}.{kind}"
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
        paths.append(path)
    return paths


def ratios(rows: Sequence[Row]) -> Figure:
    """Draw how many times as fast ours is, a bar per peer and direction, and the targets."""
    figure = Figure(figsize=(7.5, 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    found = [
        ratio
        for row in rows
        for ratio in (row.forward_ratio, row.step_ratio, row.ratio_low, row.ratio_high)
        if ratio
    ]
    targets = [wish for row in rows for wish in (row.target_forward, row.target_step) if wish]
    least, most = min([*found, *targets, 0.8]), max([*found, *targets, 1.25])
    margin = max(1.7, (most / least) ** 0.2)  # for the numbers at the ends of the bars
    axes.set_xscale("log")
    axes.set_xlim(least / margin, most * margin)
    for place, row in enumerate(rows):
        bars = [(row.forward_ratio, row.target_forward, _BLUE)]
        if row.step_ratio is not None:
            bars.append((row.step_ratio, row.target_step, _SKY))
        for position, (ratio, target, color) in enumerate(bars):
            middle = place + _BAR * (position - (len(bars) - 1) / 2)
            low, high = row.ratio_low, row.ratio_high
            quartiles = (low, high) if low and high else None
            _bar(axes, middle, ratio or 1.0, target, color, quartiles)
    for place in _every_second(rows):
        axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.045, lw=0, zorder=0)
    axes.axvline(1, color="black", lw=0.8)
    # Over many powers of ten there is no room for three numbers in each.
    decades = math.log10(most / least * margin**2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    whole = all(row.kind == WHOLE for row in rows)
    other = "something else, for its cost" if whole else "another function, of equal FLOPs or width"
    axes.set_xlabel(f"the other's time over moezoo's\nin parentheses: {other}")
    handles: list[Any] = [Line2D([], [], color=_RED, lw=2, label="target")]
    if whole:
        spread = Line2D([], [], color="black", lw=1, label="quartiles of the rounds")
        handles = [Patch(color=_BLUE, label="median"), spread, *handles]
    else:
        both = Patch(color=_SKY, label="forward and backward")
        handles = [Patch(color=_BLUE, label="forward"), both, *handles]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


def _every_second(rows: Sequence[Row]) -> list[int]:
    """Return the places of every second case's rows, which are shaded so that cases stand apart."""
    order = list(dict.fromkeys(row.case for row in rows))
    return [place for place, row in enumerate(rows) if order.index(row.case) % 2]


def _bar(
    axes: Axes,
    middle: float,
    ratio: float,
    target: float | None,
    color: str,
    quartiles: tuple[float, float] | None = None,
) -> None:
    """Draw a bar that begins at 1: to the right ours is faster, to the left the other is."""
    axes.barh(middle, ratio - 1, _BAR, left=1, color=color)
    ahead, end = ratio >= 1, ratio
    if quartiles is not None:
        axes.plot(quartiles, [middle] * 2, color="black", lw=1, zorder=5)
        end = (max if ahead else min)(ratio, *quartiles)
    low, high = axes.get_xlim()
    width = (high / low) ** _NUMBER
    if target is not None:
        ends = [middle - _BAR / 2, middle + _BAR / 2]
        axes.plot([target] * 2, ends, color="white", lw=3.6, zorder=3, solid_capstyle="butt")
        axes.plot([target] * 2, ends, color=_RED, lw=2, zorder=4, solid_capstyle="butt")
        # The number goes beyond a mark that it would hide, to either side.
        if ratio <= target <= width * end if ahead else end / width <= target <= ratio:
            end = max(end, target) if ahead else min(end, target)
    axes.annotate(
        _times(ratio),
        (end, middle),
        (4 if ahead else -4, 0),
        textcoords="offset points",
        ha="left" if ahead else "right",
        va="center_baseline",
        fontsize=6.5,
    )


def roofline(rows: Sequence[Row], limits: Limits) -> Figure:
    """Draw achieved FLOP/s over FLOPs per byte, below what bandwidth and arithmetic allow."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    looks = dict(zip(dict.fromkeys(row.title for row in rows), cycle(_LOOKS), strict=False))
    for row in rows:
        color, marker = looks[row.title]
        look: dict[str, Any] = {"color": color, "marker": marker, "ms": 6, "ls": ""}
        intensity = _intensity(row)
        ours = _rate(row, row.forward_ms)
        axes.plot(intensity, ours, **look, zorder=4)
        if row.peer_forward_ms is not None:
            theirs = _rate(row, row.peer_forward_ms)
            axes.plot([intensity] * 2, [ours, theirs], color=color, lw=0.7, alpha=0.6, zorder=2)
            axes.plot(intensity, theirs, **look, mfc="white", zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw_limits(axes, limits, [_intensity(row) for row in rows])
    axes.grid(alpha=0.3)
    axes.set_xlabel("FLOPs per byte that must be moved (forward)")
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
    handles = [
        Line2D([], [], color=color, marker=marker, ls="", label=title)
        for title, (color, marker) in looks.items()
    ]
    handles.append(
        Line2D([], [], color=_GREY, marker="o", mfc="white", ls="", label="hollow: the others")
    )
    figure.legend(handles=handles, loc="outside right upper", fontsize=7.5)
    return figure


def _draw_limits(axes: Axes, limits: Limits, intensities: Sequence[float]) -> None:
    left, right = min(intensities) / 3, max(intensities) * 3
    for name, rate in sorted(limits.matmul.items(), key=lambda item: item[1]):
        ridge = rate / limits.read
        axes.plot([max(left, ridge), right], [rate / 1e9] * 2, color="black", lw=1)
        text = f"{name} matrix product, {rate / 1e9:,.0f} GFLOP/s"
        # At the left end, where nothing is that fast: memory is the limit there.
        axes.annotate(
            text,
            (max(left, ridge), rate / 1e9),
            (18, 3),
            textcoords="offset points",
            fontsize=7,
            color=_GREY,
        )
    top = max(limits.matmul.values()) / limits.read
    ends = [left, max(left, min(top, right))]
    axes.plot(ends, [limits.read * end / 1e9 for end in ends], color="black", lw=1)
    axes.set_xlim(left, right)
    middle = math.sqrt(ends[0] * ends[1])
    axes.text(
        middle,
        1.15 * limits.read * middle / 1e9,
        f"memory, {limits.read / 1e9:,.1f} GB/s",
        fontsize=7,
        color=_GREY,
        ha="center",
        va="bottom",
        rotation=math.degrees(math.atan(limits.read / 1e9)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )


def _sizes(rows: Sequence[Row]) -> Figure:
    """Draw forward time against size, a panel per series and a line per contender."""
    drawn = {name: found for name, found in _series(rows).items() if len(_steps(found)) > 1}
    columns = 2 if len(drawn) in (2, 4) else min(3, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.9 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    for panel, (name, found) in zip(panels, drawn.items(), strict=False):
        _draw_series(panel, name, found)
    return figure


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sort rows by the series that they belong to."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.series and row.size is not None and row.forward_ms is not None:
            found.setdefault(row.series, []).append(row)
    return found


def _steps(rows: Sequence[Row]) -> list[int]:
    return sorted({row.size for row in rows if row.size is not None})


def _draw_series(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    ours = {row.size or 0: row.forward_ms or 0.0 for row in rows}
    order = sorted(ours)
    axes.plot(order, [ours[size] for size in order], "o-", color=_BLUE, lw=2, ms=4, label="moezoo")
    colors = cycle((_RED, _GREEN, _ORANGE, _PINK, _GREY, _YELLOW))
    for peer, color in zip(dict.fromkeys(row.peer for row in rows), colors, strict=False):
        theirs = sorted(
            (row.size or 0, row.peer_forward_ms or 0.0) for row in rows if row.peer == peer
        )
        axes.plot(*zip(*theirs, strict=True), "s--", color=color, lw=1.2, ms=3.5, label=peer)
    if max(order) / min(order) >= 2:
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_logarithmic(axes.yaxis)
    axes.set_xticks(order, [str(size) for size in order])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(name.partition(":")[0], fontsize=9, loc="left")
    axes.set_xlabel(name.partition(":")[2].strip())
    axes.set_ylabel("forward, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _plain_logarithmic(axis: Any) -> None:
    """Label a logarithmic axis by plain numbers, three in each power of ten if it has few."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int | None = None) -> str:
    """Write a number without an exponent."""
    return f"{value:,.12g}" if value >= 1e-4 else f"{value:.12f}".rstrip("0")


def _label(row: Row) -> str:
    dtype = "" if row.dtype == "float32" else f" {row.dtype}"
    other = row.peer if row.same_function else f"({row.peer})"
    # Of a step under autocast, whose tensors are fp32, the case alone says so.
    case = row.case.removesuffix("-bf16") if dtype else row.case
    return f"{case.removesuffix('-cuda')}{dtype} / {other}"


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.3g}×"


def _intensity(row: Row) -> float:
    assert row.flops
    assert row.bytes
    return row.flops / row.bytes


def _rate(row: Row, milliseconds: float | None) -> float:
    """Return GFLOP/s of the work that must be done, whatever was done beyond it."""
    assert row.flops
    assert milliseconds
    return row.flops / milliseconds / 1e6
