"""Rows of the benchmark: ratios, fractions of the limit, verdicts; as table, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from moezoo.atomic import atomic_write
from moezoo.bench.case import Target
from moezoo.bench.limits import Limits
from moezoo.bench.runner import LIMIT, Measured, Result
from moezoo.bench.timing import Timing


@dataclass(frozen=True)
class Row:
    """One case against one peer, as it is written down. None is what was not measured.

    Attributes:
        case, kind, title, shape, dtype, device: what was computed, and where.
        peer: the baseline; ``limit`` is what the machine allows.
        same_function: whether the peer computes the same, and was compared.
        outcome: measured, differs, missing, failed or skipped.
        error: the largest relative error of output and gradients.
        forward_ms, step_ms: our medians, forward alone and forward with backward.
        peer_forward_ms, peer_step_ms: the peer's.
        forward_ratio, step_ratio, backward_ratio: the peer's time over ours. The backward is the
            difference of the two medians. End-to-end, ``forward_…`` is the whole run, and the ratio
            the median over rounds.
        forward_spread, step_spread: half the distance between the quartiles of our samples, as a
            fraction of the median; ``peer_…`` the peer's.
        forward_runs, step_runs: samples of ours; ``peer_…`` the peer's.
        of_limit, step_of_limit: the time that the machine needs at least, over ours.
        saved_bytes, memory_bytes: ours; kept for the backward, and held for a while.
        peer_saved_bytes, peer_memory_bytes: the peer's.
        saved_ratio, memory_ratio: ours over the peer's.
        flops, bytes: of the forward pass, the least work.
        unit, value, peer_value: end-to-end, the medians in what users count: ms, ms/token, MB/s.
        ratio_low, ratio_high: end-to-end, the quartiles of the ratio.
        series, size: the line in the pictures on which this lies, and where.
        size_name: what the size is.
        target, verdict: what was to be reached, and whether it was.
        target_forward, target_step: the ratios that were to be reached, for the pictures.
        note: anything else.
    """

    case: str
    kind: str
    title: str
    shape: str
    dtype: str
    device: str
    peer: str
    same_function: bool
    outcome: str
    error: float | None = None
    forward_ms: float | None = None
    step_ms: float | None = None
    peer_forward_ms: float | None = None
    peer_step_ms: float | None = None
    forward_ratio: float | None = None
    step_ratio: float | None = None
    backward_ratio: float | None = None
    forward_spread: float | None = None
    step_spread: float | None = None
    peer_forward_spread: float | None = None
    peer_step_spread: float | None = None
    forward_runs: int | None = None
    step_runs: int | None = None
    peer_forward_runs: int | None = None
    peer_step_runs: int | None = None
    of_limit: float | None = None
    step_of_limit: float | None = None
    saved_bytes: int | None = None
    memory_bytes: int | None = None
    peer_saved_bytes: int | None = None
    peer_memory_bytes: int | None = None
    saved_ratio: float | None = None
    memory_ratio: float | None = None
    flops: float | None = None
    bytes: float | None = None
    unit: str = ""
    value: float | None = None
    peer_value: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    series: str = ""
    size: int | None = None
    size_name: str = ""
    target: str = ""
    target_forward: float | None = None
    target_step: float | None = None
    verdict: str = ""
    note: str = ""


QUICK = "A quick run with tiny sizes: it shows that all agree; times and ratios mean nothing."
_ENOUGH = 10  # samples of a median that needs no remark

# Which field a target is about, how it is called, and whether more is better.
_MEASURES = {
    "forward": ("forward_ratio", "forward", True),
    "step": ("step_ratio", "fwd+bwd", True),
    "backward": ("backward_ratio", "backward", True),
    "saved": ("saved_ratio", "saved", False),
    "memory": ("memory_ratio", "memory", False),
    "of_limit": ("of_limit", "of limit", True),
    "step_of_limit": ("step_of_limit", "fwd+bwd of limit", True),
}
WHOLE = "end-to-end"


def row(result: Result, limits: Limits, judged: bool = True) -> Row:
    """Turn a result into a row, with the limits that the same run found.

    Args:
        result: what was measured, or why not.
        limits: of the machine.
        judged: whether targets count; at small sizes they mean nothing.
    """
    case, setting = result.case, result.setting
    peer = case.peers.get(result.peer)
    target = case.limit if result.peer == LIMIT else peer.target if peer else None
    target = target if judged else None
    dtype = str(setting.dtype).removeprefix("torch.")
    made = Row(
        case=case.name,
        kind=case.kind,
        title=case.title,
        shape=" ".join(f"{name}{value}" for name, value in setting.sizes.items()),
        dtype=dtype,
        device=case.device,
        peer=result.peer,
        same_function=peer.same if peer else True,
        outcome=result.outcome,
        error=result.error,
        series=case.series,
        size=setting.sizes.get(case.size),
        size_name=case.size,
        target=_describe(target, case.kind),
        unit=case.unit,
        target_forward=target.forward if target else None,
        target_step=target.step if target else None,
        note=result.note,
    )
    if case.kind == WHOLE and result.ours is not None and result.theirs is not None:
        made = dataclasses.replace(made, **_whole(result, result.ours, result.theirs))
    elif result.ours is not None and result.work is not None:
        made = dataclasses.replace(made, **_ours(result, limits, dtype))
        if result.theirs is not None:
            made = dataclasses.replace(made, **_theirs(result.ours, result.theirs))
    return dataclasses.replace(made, verdict=verdict(made, target))


def _ours(result: Result, limits: Limits, dtype: str) -> dict[str, Any]:
    assert result.ours is not None
    assert result.work is not None
    ours, (work, step_work) = result.ours, result.work
    found = {
        **_times("", ours),
        "of_limit": limits.seconds(work, dtype) / ours.forward.median,
        "saved_bytes": ours.saved,
        "memory_bytes": ours.memory,
        "flops": work.flops,
        "bytes": work.read + work.written,
    }
    if ours.step is not None:
        found["step_of_limit"] = limits.seconds(step_work, dtype) / ours.step.median
    return found


def _whole(result: Result, ours: Measured, theirs: Measured) -> dict[str, Any]:
    """Return the figures of a case of kind end-to-end: its rounds give one ratio each."""
    rounds = result.ratios if len(result.ratios) > 1 else 2 * result.ratios
    low, middle, high = quantiles(rounds, n=4, method="inclusive")
    unit, amount = result.case.unit, result.amount
    return {
        **_times("", ours),
        **_times("peer_", theirs),
        "value": _in_unit(unit, ours.forward.median, amount),
        "peer_value": _in_unit(unit, theirs.forward.median, amount),
        "forward_ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "memory_bytes": ours.memory,
        "peer_memory_bytes": theirs.memory,
        "memory_ratio": _ratio(ours.memory, theirs.memory),
    }


def _in_unit(unit: str, seconds: float, amount: float) -> float:
    """Return a run's time in a unit, as ``ms/token``, or its speed, as ``MB/s``."""
    if unit.endswith("/s"):
        return amount / max(seconds, 1e-9)
    return (1e3 if unit.startswith("ms") else 1.0) * seconds / amount


def _theirs(ours: Measured, theirs: Measured) -> dict[str, Any]:
    found = {
        **_times("peer_", theirs),
        "forward_ratio": theirs.forward.median / ours.forward.median,
        "peer_saved_bytes": theirs.saved,
        "peer_memory_bytes": theirs.memory,
        "saved_ratio": _ratio(ours.saved, theirs.saved),
        "memory_ratio": _ratio(ours.memory, theirs.memory),
    }
    if ours.step is not None and theirs.step is not None:
        found["step_ratio"] = theirs.step.median / ours.step.median
        found["backward_ratio"] = _ratio(_backward(theirs), _backward(ours))
    return found


def _times(prefix: str, measured: Measured) -> dict[str, Any]:
    parts: dict[str, Timing | None] = {"forward": measured.forward, "step": measured.step}
    found: dict[str, Any] = {}
    for name, timing in parts.items():
        if timing is not None:
            found[f"{prefix}{name}_ms"] = 1e3 * timing.median
            found[f"{prefix}{name}_spread"] = timing.spread
            found[f"{prefix}{name}_runs"] = len(timing.seconds)
    return found


def _backward(measured: Measured) -> float:
    assert measured.step is not None
    return measured.step.median - measured.forward.median


def _ratio(one: float | None, other: float | None) -> float | None:
    if one is None or other is None or other <= 0 or one < 0:
        return None
    return one / other


def _label(name: str, label: str, kind: str) -> str:
    return "ratio" if kind == WHOLE and name == "forward" else label


def _describe(target: Target | None, kind: str = "") -> str:
    """Return a target as text: ``forward ≥ 3.5×, memory ≤ 0.3×``."""
    if target is None:
        return ""
    parts = []
    for name, (_, label, more) in _MEASURES.items():
        wanted = getattr(target, name)
        if wanted is not None:
            number = f"{wanted:.0%}" if "limit" in name else f"{wanted:.3g}×"
            parts.append(f"{_label(name, label, kind)} {'≥' if more else '≤'} {number}")
    return ", ".join(parts)


def verdict(row: Row, target: Target | None) -> str:
    """Return whether the target was met, or by how much each part of it was missed."""
    if row.outcome != "measured":
        return row.note if row.outcome != "failed" else f"fails: {row.note}"
    if target is None:
        return "" if row.error is None else "agrees"
    misses = []
    for name, (attribute, label, more) in _MEASURES.items():
        wanted, found = getattr(target, name), getattr(row, attribute)
        label = _label(name, label, row.kind)
        if wanted is None:
            continue
        if found is None:
            misses.append(f"{label} was not measured")
            continue
        missing = (wanted - found if more else found - wanted) / wanted
        if missing > 0:
            misses.append(f"{label} misses by {math.ceil(100 * missing)} %")
    return "; ".join(misses) or "met"


def cells(row: Row) -> list[str]:
    """Return a row of the printed table."""
    return [
        row.title,
        row.shape if row.dtype == "float32" else f"{row.shape} {row.dtype}",
        row.peer if row.same_function else f"({row.peer})",
        _times_text(row.forward_ms, row.step_ms) if row.device == "cuda" else "",
        _number(row.forward_ratio, "×"),
        _number(row.step_ratio, "×"),
        " / ".join(f"{f:.0%}" for f in (row.of_limit, row.step_of_limit) if f is not None),
        _number(row.saved_ratio, "×"),
        _number(row.memory_ratio, "×"),
        row.target,
        row.verdict + _few_samples(row),
    ]


def whole_cells(row: Row) -> list[str]:
    """Return a row of the printed table of end-to-end cases."""
    memory = row.peer_memory_bytes
    return [
        row.title,
        row.shape,
        row.peer if row.same_function else f"({row.peer})",
        _number(row.value, ""),
        _number(row.peer_value, ""),
        row.unit,
        _number(row.forward_ratio, "×"),
        "" if row.ratio_low is None else f"{row.ratio_low:.3g}–{row.ratio_high:.3g}",
        _number(row.memory_ratio, "×") if memory else "",
        row.target,
        row.verdict + _few_samples(row),
    ]


WHOLE_COLUMNS = [
    "end to end",
    "size",
    "against",
    ">ours",
    ">theirs",
    "unit",
    ">ratio",
    ">quartiles",
    ">memory",
    "target",
    "verdict",
]
COLUMNS = [
    "op or layer",
    "shape",
    "against",
    ">ms",
    ">forward",
    ">fwd+bwd",
    ">of limit",
    ">saved",
    ">memory",
    "target",
    "verdict",
]


def _few_samples(row: Row) -> str:
    """Return a remark where a contender was too slow for ten samples."""
    counts = [row.forward_runs, row.step_runs, row.peer_forward_runs, row.peer_step_runs]
    fewest = min((count for count in counts if count is not None), default=_ENOUGH)
    return f" ({fewest} samples)" if fewest < _ENOUGH else ""


def _times_text(*values: float | None) -> str:
    return " / ".join(f"{value:.3g}" for value in values if value is not None)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def write(folder: Path, rows: Sequence[Row], limits: Limits, environment: dict[str, Any]) -> None:
    """Write results.json and results.csv; each is whole or is the one before."""
    document = {
        "environment": environment,
        "limits": dataclasses.asdict(limits),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    with atomic_write(folder / "results.json", "w") as file:
        json.dump(document, file, indent=1, ensure_ascii=False)
        file.write("\n")
    # A row that is copied out of the file takes its origin along.
    origin = {name: environment[name] for name in ("date", "threads", "torch", "moezoo", "commit")}
    names = [field.name for field in dataclasses.fields(Row)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["machine", *origin, *names], lineterminator="\n")
    writer.writeheader()
    for one in rows:
        writer.writerow({"machine": environment["device"], **origin, **dataclasses.asdict(one)})
    with atomic_write(folder / "results.csv", "w") as file:
        file.write(buffer.getvalue())


def read(folder: Path) -> tuple[list[Row], Limits, dict[str, Any]]:
    """Read what :func:`write` wrote."""
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [Row(**values) for values in document["rows"]]
    return rows, Limits(**document["limits"]), document["environment"]
