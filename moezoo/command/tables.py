"""Print tables: drawn on a terminal, plain aligned columns when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their column names.

    Args:
        title: shown above the table.
        columns: names; one that starts with ``>`` is aligned to the right.
        rows: one text per column.
    """
    if sys.stdout.isatty():
        _print_drawn(title, columns, rows)
    else:
        _print_plain(title, columns, rows)


def _print_drawn(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [[column.lstrip(">") for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(title)
    for line in lines:
        cells = (
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        print("  ".join(cells).rstrip())
    print()


def markdown_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table's lines in Markdown; columns as in :func:`print_table`."""
    names = [column.lstrip(">") for column in columns]
    rules = ["--:" if column.startswith(">") else "---" for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in (names, rules, *rows)]


def count(number: int) -> str:
    """Write a count with three digits and a unit: ``12.3 M``."""
    if number < 1000:
        return str(number)
    # Three digits; the exponent counts after rounding, so that 999 999 becomes 1.00 M.
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    thousands, digits = divmod(int(exponent), 3)
    return f"{float(mantissa) * 10**digits:.{2 - digits}f} {' kMGTPE'[thousands]}"
