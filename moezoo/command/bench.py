"""`moezoo bench`: ops and layers against public implementations of the same thing."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from moezoo.bench.case import Case
from moezoo.bench.end_to_end import run_whole
from moezoo.bench.environment import environment
from moezoo.bench.limits import Limits, measure
from moezoo.bench.pictures import draw
from moezoo.bench.registry import every_case
from moezoo.bench.results import (
    COLUMNS,
    QUICK,
    WHOLE,
    WHOLE_COLUMNS,
    Row,
    cells,
    row,
    whole_cells,
    write,
)
from moezoo.bench.runner import Options, Result, run_case, skipped, thread_count
from moezoo.command.tables import print_table
from moezoo.errors import InputError, check_int, check_number, nearest

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def bench(
    cases: str = "all",
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    threads: int | None = None,
    quick: bool = False,
    peers: str = "all",
    runs: int = 10,
    minutes: float | None = None,
    output: str | None = None,
) -> None:
    """Measure ops and layers against public implementations of the same thing.

    Outputs and gradients are compared first: a wrong one gets no speed. Prints a table
    and writes it as CSV and JSON, with pictures, to the output directory.

    Args:
        cases: op, layer, all (both), end-to-end (whole steps, replies and commands), names of
            cases, or ops as moezoo doctor names them, for the cases that run them, separated by
            commas; may come first, without --cases.
        device: cpu or cuda.
        dtype: of tokens and tables: float32, bfloat16, or auto for each case's own.
        threads: torch's threads on the CPU; default: as torch has it.
        quick: small sizes, to see that everything works; the times mean nothing.
        peers: all, or names of peers, separated by commas.
        runs: samples of each time. Slow contenders get fewer, which the results say.
        minutes: begin no further case after that many minutes.
        output: directory of the results; default: runs/bench/ and the device, or end-to-end.

    Raises:
        InputError: an option is no good, or there is no such device.
    """
    check_int("runs", runs)
    if threads is not None:
        check_int("threads", threads)
    if minutes is not None:
        check_number("minutes", minutes)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: there is no usable CUDA device here; give cpu")
    chosen = select(cases, device)
    options = Options(
        quick=quick,
        dtype=_DTYPES[dtype],
        peers=select_peers(peers, chosen),
        runs=runs,
        threads=threads,
    )
    results, limits = run_cases(chosen, options, torch.device(device), minutes)
    rows = [row(result, limits, judged=not quick) for result in results]
    kind = WHOLE if all(case.kind == WHOLE for case in chosen) else device
    folder = Path(output) if output is not None else Path("runs") / "bench" / kind
    with thread_count(threads):
        where = {**environment(torch.device(device)), "quick": quick}
    write(folder, rows, limits, where)
    draw(folder, rows, limits, where)
    report(rows, limits, where)
    print(f"{folder}/ holds results.csv, results.json and the pictures.")


def select(cases: str, device: str) -> list[Case]:
    """Return the cases of a device that are meant: by their names, kinds, or ops that they run.

    Raises:
        InputError: there is no such case on this device.
    """
    there = [case for case in every_case() if case.device == device]
    known = [*dict.fromkeys(name for case in there for name in _names(case))]
    names = {name.strip() for name in cases.split(",")}
    for name in sorted(names.difference(known)):
        raise InputError(f"cases: there is no '{name}' on {device}{nearest(name, known)}")
    return [case for case in there if names.intersection(_names(case))]


def _names(case: Case) -> tuple[str, ...]:
    parts = () if case.kind == WHOLE else ("all",)
    return (case.name, case.kind, *parts, *case.ops)


def select_peers(peers: str, cases: Sequence[Case]) -> frozenset[str] | None:
    """Return the names of the peers that are meant; None for all.

    Raises:
        InputError: none of the cases has such a peer.
    """
    if peers == "all":
        return None
    known = {name for case in cases for name in case.peers}
    names = frozenset(name.strip() for name in peers.split(","))
    for name in sorted(names - known):
        raise InputError(f"peers: none of the cases has '{name}'{nearest(name, known)}")
    return names


def run_cases(
    cases: Sequence[Case], options: Options, device: torch.device, minutes: float | None
) -> tuple[list[Result], Limits]:
    """Run the cases one after the other, and measure the limits before and after."""
    with thread_count(options.threads):
        limits = measure(device, small=options.quick)
    started = time.monotonic()
    results: list[Result] = []
    for number, case in enumerate(cases, 1):
        before = time.monotonic()
        if minutes is not None and before - started > 60 * minutes:
            results += skipped(case, options, f"not begun within {minutes:g} minutes")
            continue
        print(f"[{number}/{len(cases)}] {case.name} ...", end="", file=sys.stderr, flush=True)
        results += (run_whole if case.kind == WHOLE else run_case)(case, options)
        print(f" {time.monotonic() - before:.0f} s", file=sys.stderr)
    with thread_count(options.threads):
        return results, limits.best(measure(device, small=options.quick))


def report(rows: Sequence[Row], limits: Limits, where: dict[str, object]) -> None:
    """Print the table, and where it was measured."""
    if where.get("quick"):
        print(f"{QUICK}\n")
    parts = [row for row in rows if row.kind != WHOLE]
    written = [cells(row) for row in parts]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] for line in written)]
    columns = [COLUMNS[i] for i in filled]
    mark = " (quick)" if where.get("quick") else ""
    for kind in ("op", "layer"):
        lines = [line for row, line in zip(parts, written, strict=True) if row.kind == kind]
        if lines:
            print_table(f"{kind}s{mark}", columns, [[line[i] for i in filled] for line in lines])
    if whole := [whole_cells(row) for row in rows if row.kind == WHOLE]:
        print_table(f"{WHOLE}{mark}", WHOLE_COLUMNS, whole)
    print("Ratios are the other's time over ours; saved and memory are our bytes over the other's.")
    print("In parentheses: does something else, and is there for its cost.")
    matmul = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in limits.matmul.items())
    print(
        f"Limits: {limits.read / 1e9:.1f} GB/s read, {limits.write / 1e9:.1f} GB/s fresh memory, "
        f"GFLOP/s {matmul}."
    )
    print(
        f"{where['device']}, threads: {where['threads']}, torch {where['torch']}, "
        f"moezoo {where['moezoo']} ({where['commit'] or 'no checkout'}), {where['date']}."
    )
    if where.get("quick"):
        print(QUICK)
