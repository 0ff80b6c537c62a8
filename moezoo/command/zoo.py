"""`moezoo zoo`: every method with its paper, size, cost and recipe.

Layers must be built to be counted, and torch takes seconds to import; the answer at the default
width is therefore kept in ``zoo.json``, which a test compares with the layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moezoo.command.tables import count, print_table
from moezoo.errors import check_int

WIDTH = 512
"""The width that ``TABLE`` is for."""
TABLE = Path(__file__).with_name("zoo.json")


def list_zoo(d_model: int = WIDTH, json: bool = False) -> None:
    """List every method: its paper, its recipe, parameters and cost at one width.

    Sizes are those of one layer with the method's own defaults. FLOPs are forward, of one
    token's matrix products; a multiply-add counts two. A method's name is a value of
    `--model.ffn` of `moezoo fit`, and a recipe's one of `--recipe`.

    Args:
        d_model: Width of the residual stream; methods that it does not fit are named last.
        json: Print JSON instead of a table.
    """
    check_int("d_model", d_model)
    entries, unfit = (_kept(), []) if d_model == WIDTH else _counted(d_model)
    left_out = f"{', '.join(unfit)}: d_model {d_model} does not fit them; a multiple of 8 does"
    if json:
        _print_json(entries)
        if unfit:
            print(left_out, file=sys.stderr)
        return
    columns = ["method", "paper", "arXiv", ">experts", ">parameters", ">active", ">FLOPs/token"]
    columns.append("recipe")
    rows = [
        [
            entry["name"],
            f"{entry['authors']} {entry['year']}",
            entry["arxiv"],
            "-" if entry["experts"] is None else str(entry["experts"]),
            count(entry["total_parameters"]),
            count(entry["active_parameters"]),
            count(entry["flops_per_token"]),
            entry["recipe"] or "-",
        ]
        for entry in entries
    ]
    print_table(f"{len(rows)} methods at d_model={d_model}", columns, rows)
    if unfit:
        print(left_out)
    print("Train one: moezoo fit --model.ffn METHOD, or moezoo fit --recipe RECIPE")


def _counted(d_model: int) -> tuple[list[dict[str, Any]], list[str]]:
    from moezoo.command.counted import counted  # not above: it imports torch

    return counted(d_model)


def write_table() -> None:
    """Write ``zoo.json`` anew, one method a line, after a method or its default size changed."""
    rows = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in _counted(WIDTH)[0])
    TABLE.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def _kept() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return entries


def _print_json(entries: list[dict[str, Any]]) -> None:
    json.dump(entries, sys.stdout, indent=2, ensure_ascii=False)
    print()
