"""The files of a finished experiment: table.md, results.json and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.command.tables import markdown_lines, print_table
from moezoo_train.experiments.common.verdict import JudgedDifference
from moezoo_train.measure.environment import environment
from moezoo_train.measure.writing import save_figure, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    folder: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Mapping[str, Any],
    *,
    verdicts: Sequence[JudgedDifference] = (),
    summary: str = "",
    pictures: Mapping[str, Figure] | None = None,
) -> None:
    """Print the table and what follows from it, and write them, the numbers and the pictures.

    Args:
        folder: of the experiment.
        title: of the table.
        columns: names; one that starts with ``>`` is aligned to the right.
        rows: one text per column.
        results: for results.json: settings, and every run's figures.
        verdicts: on the parts of a claim.
        summary: in Markdown, where there are no verdicts.
        pictures: by file name without its ending.
    """
    print_table(title, columns, rows)
    for verdict in verdicts:
        print(verdict)
    if summary:
        print(summary)
    judged = {"verdicts": [asdict(verdict) for verdict in verdicts]} if verdicts else {}
    date = datetime.now(UTC).date().isoformat()
    whole = {"title": title, "environment": {**environment(), "date": date}, **results, **judged}
    write_json(folder / "results.json", whole)
    lines = [f"# {title}", "", *markdown_lines(columns, rows), ""]
    if verdicts:
        lines += [f"- {verdict}" for verdict in verdicts]
        how = "Verdicts are by the 95 % interval of the difference (Student's t), paired by seed."
        lines += ["", how, ""]
    if summary:
        lines += [summary, ""]
    write_text(folder / "table.md", "\n".join(lines))
    names = ["table.md", "results.json"]
    for name, figure in (pictures or {}).items():
        names.append(f"{name}.png")
        save_figure(folder / names[-1], figure)
    print(f"{folder}/ holds {', '.join(names)}.")
