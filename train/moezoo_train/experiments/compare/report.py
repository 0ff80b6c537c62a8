"""The files of a comparison: the table as Markdown, CSV and JSON, pictures, a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moezoo.command.tables import print_table
from moezoo_train.experiments.compare import claims
from moezoo_train.experiments.compare.curves import Curve, curves_csv
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.figure import draw
from moezoo_train.experiments.compare.page import Finished, write_page
from moezoo_train.experiments.compare.results import Row, loads
from moezoo_train.experiments.compare.settings import Experiment, configuration
from moezoo_train.experiments.compare.table import COLUMNS, cells_of, markdown, table_csv
from moezoo_train.measure.writing import write_text

PRINTED = COLUMNS[:-1]
"""The terminal's table is wide enough without the memory."""


def write_report(
    output: Path,
    title: str,
    experiment: Experiment,
    rows: list[Row],
    results: list[RunResult],
    curves: Sequence[Curve] = (),
    missing: Sequence[str] = (),
) -> list[str]:
    """Write all files of a comparison, print its table, and return the files' names.

    Args:
        output: the comparison's directory.
        title: of the table.
        experiment: the options of the comparison.
        rows: one per method, best first.
        results: of all runs.
        curves: how their losses fell.
        missing: runs that are not trained yet.
    """
    cells = [cells_of(row, experiment.model.num_layers) for row in rows]
    notes = [*conditions(experiment, results), *remarks(rows)]
    if missing:
        notes.append(f"Not trained yet: {'; '.join(missing)}.")
    whole = {
        "title": title,
        "notes": notes,
        "command": f"moezoo compare --config {output / 'config.yaml'}",
        "experiment": asdict(experiment),
        "rows": [asdict(row) for row in rows],
        "runs": [asdict(result) for result in results],
    }
    judged = claims.judge(experiment.claims, results)
    texts = {
        "table.md": markdown(title, cells, notes),
        "results.csv": table_csv(rows),
        "results.json": json.dumps(whole, indent=2) + "\n",
        "curves.csv": curves_csv(curves),
        "config.yaml": configuration(experiment, str(output)),
    }
    if judged:
        texts["claims.md"] = claims.markdown(title, judged, notes)
    for name, text in texts.items():
        write_text(output / name, text)
    pictures = draw(
        output, rows, curves, loads(rows, results), experiment.baseline, notes[0], judged
    )
    finished = Finished(whole, rows, results, list(curves), texts["config.yaml"])
    write_page(output, finished, pictures)
    print_table(title, PRINTED, [line[: len(PRINTED)] for line in cells])
    for note in notes:
        print(note)
    for one in judged:
        print(f"{one.verdict}: {one.claim.says} ({one.claim.paper})")
    return [*texts, *pictures, "index.html"]


def conditions(experiment: Experiment, results: list[RunResult]) -> list[str]:
    """Return in a line or two what the runs have in common."""
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
    kept = [name for name, options in experiment.methods.items() if options.sparse_ift]
    if kept:
        lines.append(f"FLOPs are those of the weights that are kept: {', '.join(kept)}.")
    return lines


def remarks(rows: list[Row]) -> list[str]:
    """Return what the table may hide: ablations that win, losses that compare with nothing."""
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
