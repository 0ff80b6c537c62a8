"""The table and the picture of ``docs/real_models.md``.

``python docs/real_models/draw.py`` draws the figures of ``results.json`` anew and prints the table
of the page. Given the folder of ``make real`` it gathers what was measured there, and writes
``results.json`` and ``frontier.png`` into that.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from moezoo.analysis.curves import draw_frontier
from moezoo.command.tables import markdown_lines
from moezoo_models.checkpoints.atomic import atomic_write

HERE = Path(__file__).parent
CARVED = {"carve": "carved", "prune, refitted": "static_refit", "prune": "static"}
"""Rows that come of ``moezoo carve``, and what its report calls them."""


def gather(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of ``make real``, each with the text that it was measured on."""
    frontier = json.loads((folder / "frontier" / "frontier.json").read_text(encoding="utf-8"))
    written = (folder / "carved" / "moezoo_conversion.json").read_text(encoding="utf-8")
    report = json.loads(written)["extra"]
    keys = ("method", "work", "ratio", "error")
    text = _named(frontier["calibration"])
    points = [{key: point[key] for key in keys} | {"text": text} for point in frontier["points"]]
    plan, perplexity = report["plan"], report["perplexity"]
    kept = plan["d_shared"] + plan["top_k"] * plan["d_expert"]
    neurons = plan["d_shared"] + plan["num_experts"] * plan["d_expert"]
    for method, name in CARVED.items():
        points.append(
            {
                "method": method,
                "work": report["work"] if method == "carve" else kept / neurons,
                "ratio": perplexity[name] / perplexity["dense"],
                "error": None,
                "text": _named(report["calibration"]),
            }
        )
    return points


def _named(calibration: dict[str, Any]) -> str:
    names = ", ".join(Path(each).name for each in calibration["source"])
    return f"{names}, {calibration['tokens']:,} + {calibration['held_out_tokens']:,}"


def table(points: list[dict[str, Any]]) -> list[str]:
    """Return the table in Markdown, those that save least first."""
    ordered = sorted(points, key=lambda point: (-point["work"], point["ratio"]))
    rows = [[p["method"], f"{p['work']:.2f}", _ratio(p), p["text"]] for p in ordered]
    return list(markdown_lines(["method", ">work", ">perplexity over dense", "text"], rows))


def _ratio(point: dict[str, Any]) -> str:
    error = "" if point["error"] is None else f" ± {point['error']:.3f}"
    return f"{point['ratio']:.3f}{error}"


def draw(points: list[dict[str, Any]]) -> bytes:
    """Return the picture as PNG: one curve per method."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        place = (point["work"], point["ratio"], point["error"] or 0.0)
        curves.setdefault(point["method"], []).append(place)
    picture = io.BytesIO()
    draw_frontier(curves, "SmolLM2-135M-Instruct").savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def main(folder: str | None = None) -> None:
    """Write the picture, of what was measured anew the figures too, and print the table."""
    target = HERE if folder is None else Path(folder)
    file = target / "results.json"
    if folder is None:
        points = json.loads(file.read_text(encoding="utf-8"))
    else:
        points = gather(target)
        with atomic_write(file, "w") as opened:
            json.dump(points, opened, indent=1, ensure_ascii=False)
            opened.write("\n")
    with atomic_write(target / "frontier.png") as opened:
        opened.write(draw(points))
    print("\n".join(table(points)))


if __name__ == "__main__":
    main(*sys.argv[1:])
