"""What an experiment leaves: table.md, results.json and a picture."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moezoo.command.tables import markdown_lines, print_table
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_train.experiments.common.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    folder: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    verdicts: Sequence[Verdict],
    results: Mapping[str, Any],
    pictures: Mapping[str, Figure],
) -> None:
    """Print the table and the verdicts, and write them, the numbers and the pictures.

    Args:
        folder: of the experiment.
        title: of the table.
        columns: names; one that starts with ``>`` is aligned to the right.
        rows: one text per column.
        verdicts: on the claim's parts.
        results: for results.json: what was done, and every run's figures.
        pictures: by file name without its ending.
    """
    print_table(title, columns, rows)
    for verdict in verdicts:
        print(verdict)
    whole = {
        "title": title,
        "environment": _environment(),
        **results,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    with atomic_write(folder / "results.json", "w") as file:
        json.dump(whole, file, indent=2)
        file.write("\n")
    lines = markdown_lines(columns, rows)
    said = [f"- {verdict}" for verdict in verdicts]
    said += [
        "",
        "Verdicts are by the 95 % interval of the difference (Student's t), paired by seed.",
    ]
    with atomic_write(folder / "table.md", "w") as file:
        file.write("\n".join([f"# {title}", "", *lines, "", *said, ""]))
    for name, figure in pictures.items():
        save_picture(folder / f"{name}.png", figure)
    print(f"{folder}/ holds table.md, results.json, {', '.join(f'{n}.png' for n in pictures)}.")


def save_picture(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
