"""The table of a comparison: printed, ``table.md``, ``results.csv`` and ``results.json``."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moezoo.command.tables import count, print_table
from moezoo_train.checkpointing import atomic_write
from moezoo_train.compare.figure import draw
from moezoo_train.compare.results import Row
from moezoo_train.compare.run import Result
from moezoo_train.compare.settings import Experiment

NOTHING = "–"
COLUMNS = (
    "method",
    "blocks",
    "width",
    ">val loss",
    ">bits/byte",
    ">random routing",
    ">random − own",
    ">parameters",
    ">active",
    ">FLOPs ÷ baseline",
    ">tokens/s",
    ">evenness",
    ">busiest ÷ mean",
    ">used",
    ">unevenness",
)


def write_report(
    output: Path, title: str, experiment: Experiment, rows: list[Row], results: list[Result]
) -> list[str]:
    """Write all files of a comparison, print its table, and give the files' names.

    Args:
        output: the comparison's directory.
        title: what the table is called.
        experiment: what was compared.
        rows: one per method, best first.
        results: of all runs.
    """
    cells = [cells_of(row, experiment.model.num_layers) for row in rows]
    notes = [*conditions(experiment, results), *remarks(rows)]
    with atomic_write(output / "table.md", "w") as file:
        file.write(markdown(title, cells, notes))
    with atomic_write(output / "results.csv", "w") as file:
        file.write(table_csv(rows))
    with atomic_write(output / "results.json", "w") as file:
        whole = {
            "title": title,
            "notes": notes,
            "experiment": asdict(experiment),
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(result) for result in results],
        }
        json.dump(whole, file, indent=2)
        file.write("\n")
    files = ["table.md", "results.csv", "results.json"]
    if any(row.loss for row in rows):
        files.append("loss.png")
        draw(output / "loss.png", rows, experiment.baseline, notes[0])
    print_table(title, COLUMNS, cells)
    for note in notes:
        print(note)
    return files


def cells_of(row: Row, num_layers: int) -> list[str]:
    """Write a row's cells as text."""
    every = len(row.layers) == num_layers
    return [
        row.name if row.causal else f"{row.name} (not causal)",
        "all" if every else ", ".join(map(str, row.layers)),
        NOTHING if row.width is None else f"{row.width[0]} {row.width[1]}",
        "failed" if row.loss is None else str(row.loss),
        _text(row.bits_per_byte),
        _text(row.random_loss),
        NOTHING if row.gain is None else _signed(row.gain),
        NOTHING if row.total_parameters is None else count(row.total_parameters),
        NOTHING if row.active_parameters is None else count(row.active_parameters),
        f"{row.flops_ratio:.3f}",
        NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        NOTHING if row.evenness is None else f"{row.evenness:.2f}",
        NOTHING if row.busiest is None else f"{row.busiest:.1f}",
        NOTHING if row.usage is None else f"{100 * row.usage:.1f} %",
        NOTHING if row.unevenness is None else f"{row.unevenness:.2f}",
    ]


def _text(value: Any) -> str:
    return NOTHING if value is None else str(value)


def _signed(value: Any) -> str:
    text = str(value)
    return text.replace("-", "−") if value.value < 0 else f"+{text}"


def conditions(experiment: Experiment, results: list[Result]) -> list[str]:
    """Say in a line or two what the runs have in common."""
    text, model = experiment.text, experiment.model
    tokens = experiment.max_steps * text.batch_size * text.sequence_length
    seeds = len(experiment.seeds)
    lines = [
        f"{model.num_layers} blocks of width {model.d_model}, {tokens:,} tokens of {text.source} "
        f"(vocabulary {text.vocab_size:,}), {seeds} seed{'s' if seeds > 1 else ''}"
        + (", mean ± standard error." if seeds > 1 else ".")
    ]
    known = [result.environment for result in results if result.environment]
    if known:
        machine = known[0]
        lines.append(
            f"{machine['device']}, {machine['threads']} threads, {machine['precision']}, "
            f"torch {machine['torch']}, Python {machine['python']}."
        )
    return lines


def remarks(rows: list[Row]) -> list[str]:
    """Say what the table alone may hide: ablations that win, losses that compare with nothing."""
    lines = []
    lost = [row.name for row in rows if row.gain is not None and row.gain.value <= 0]
    if lost:
        lines.append(f"Not better than its own random routing: {', '.join(lost)}.")
    ahead = [row.name for row in rows if not row.causal]
    if ahead:
        lines.append(
            f"Not causal, its loss compares with no other: {', '.join(ahead)} (tokens see whether "
            "later tokens are chosen)."
        )
    lines += [f"Failed: {failure}" for row in rows for failure in row.failures]
    return lines


def markdown(title: str, cells: list[list[str]], notes: list[str]) -> str:
    """Write the table in Markdown."""
    header = [name.lstrip(">") for name in COLUMNS]
    rule = ["---:" if name.startswith(">") else "---" for name in COLUMNS]
    lines = [f"| {' | '.join(line)} |" for line in [header, rule, *cells]]
    return "\n".join([f"# {title}", "", *lines, "", *(f"{note}\n" for note in notes)])


def table_csv(rows: list[Row]) -> str:
    """Write the rows as numbers, one column each."""
    flat = [_flat(row) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "method": row.name,
        "layer": row.layer,
        "blocks": " ".join(map(str, row.layers)),
        "width": row.width[0] if row.width else "",
        "width_value": row.width[1] if row.width else "",
        "causal": row.causal,
    }
    for name in ("loss", "bits_per_byte", "random_loss", "gain"):
        value = getattr(row, name)
        numbers[name] = value.value if value else ""
        numbers[f"{name}_error"] = "" if value is None or value.error is None else value.error
    rest = (
        "total_parameters",
        "active_parameters",
        "flops_ratio",
        "tokens_per_second",
        "evenness",
        "busiest",
        "usage",
        "unevenness",
    )
    numbers |= {name: getattr(row, name) for name in rest}
    return numbers | {"failures": "; ".join(row.failures)}
