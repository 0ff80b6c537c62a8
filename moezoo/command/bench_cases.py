"""The benchmark's cases as the help of `moezoo bench` lists them.

Building the cases imports torch and more, which takes seconds. Their names are therefore kept in
``bench_cases.json``, which a test compares with the cases.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

TABLE = Path(__file__).with_name("bench_cases.json")
_WIDTH = 80


def list_cases() -> str:
    """Return the names of cases for the help, by device and kind, and the ops with cases."""
    found: dict[str, list[str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    lines = ["", "cases:"]
    for title, names in found.items():
        lines += textwrap.wrap(
            f"{title}: {', '.join(names)}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def named_cases() -> dict[str, list[str]]:
    """Return the names of all cases, by device and kind, and the ops with cases."""
    from moezoo.bench.registry import every_case  # not above: it imports torch
    from moezoo.bench.results import WHOLE

    found: dict[str, list[str]] = {}
    cases = every_case()
    for case in cases:
        kind = WHOLE if case.kind == WHOLE else f"{case.kind}s, {case.device}"
        found.setdefault(kind, []).append(case.name)
    found["by op"] = sorted({op for case in cases for op in case.ops})
    return found


def write_table() -> None:
    """Write ``bench_cases.json`` anew, after a case was added, renamed or removed."""
    TABLE.write_text(json.dumps(named_cases(), indent=2) + "\n", encoding="utf-8")
