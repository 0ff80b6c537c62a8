"""JSON, text and figures on disk, each written whole or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo_models.checkpoints.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: Path, content: Any, allow_nan: bool = True) -> None:
    """Write content as indented JSON.

    Raises:
        ValueError: ``allow_nan`` is false and a number is not finite.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")


def save_figure(path: Path, figure: Figure, dpi: float | str = "figure") -> None:
    """Write a figure as PNG or SVG, by the path's ending; equal figures give equal files."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "moezoo"}):  # no random names either
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
