"""What `moezoo zoo` says of the methods, counted on the layers themselves."""

from __future__ import annotations

from typing import Any

import torch

import moezoo
from moezoo.command import recipes


def counted(d_model: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Describe every method that a width fits, and name those that it does not.

    Blocks of matrices, for one, are as wide as their method says, and d_model is a multiple.
    """
    entries, unfit = [], []
    for method in moezoo.zoo():
        try:
            entries.append(describe(method, d_model))
        except moezoo.InputError:
            unfit.append(method.name)
    return entries, unfit


def describe(method: moezoo.Method, d_model: int) -> dict[str, Any]:
    """Return a method's paper, cost at a width, and recipe, without allocating its weights."""
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
        "recipe": method.name if method.name in recipes.names() else None,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "flops_per_token": cost.flops_per_token,
        "bytes_per_token": cost.bytes_per_token,
    }
