"""`moezoo zoo`: every method with its paper, size and cost."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import moezoo
from moezoo.command.tables import count, print_table
from moezoo.errors import check_int


def zoo(d_model: int = 512, json: bool = False) -> None:
    """List every method: its paper, parameters and cost at one width.

    Sizes are those of one layer with the method's own defaults. FLOPs are forward, of one
    token's matrix products; a multiply-add counts two.

    Args:
        d_model: Width of the residual stream.
        json: Print JSON instead of a table.
    """
    check_int("d_model", d_model)
    entries = [describe(method, d_model) for method in moezoo.zoo()]
    if json:
        _print_json(entries)
        return
    columns = ["method", "paper", "arXiv", ">experts", ">parameters", ">active", ">FLOPs/token"]
    rows = [
        [
            entry["name"],
            f"{entry['authors']} {entry['year']}",
            entry["arxiv"],
            "-" if entry["experts"] is None else str(entry["experts"]),
            count(entry["total_parameters"]),
            count(entry["active_parameters"]),
            count(entry["flops_per_token"]),
        ]
        for entry in entries
    ]
    print_table(f"{len(rows)} methods at d_model={d_model}", columns, rows)


def describe(method: moezoo.Method, d_model: int) -> dict[str, Any]:
    """Return a method's paper and its cost at a width, without allocating its weights."""
    with torch.device("meta"):
        layer = method.build(d_model)
    cost = layer.cost()
    return {
        "name": method.name,
        "class_path": layer.config()["class_path"],
        "authors": method.paper.authors,
        "year": method.paper.year,
        "title": method.paper.title,
        "arxiv": method.paper.arxiv,
        "experts": getattr(layer, "num_experts", None),
        "causal": layer.causal,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "flops_per_token": cost.flops_per_token,
        "bytes_per_token": cost.bytes_per_token,
    }


def _print_json(entries: list[dict[str, Any]]) -> None:
    json.dump(entries, sys.stdout, indent=2, ensure_ascii=False)
    print()
