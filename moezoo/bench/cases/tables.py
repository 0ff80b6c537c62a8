"""Shared parts of the cases that read rows of large tables."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.bench.case import Gradients, Setting, Work


def random_rows(setting: Setting, tokens: int, choices: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draw rows evenly, ``(T, J)`` int64, and weights in fp32 that sum to one per token."""
    indices = torch.randint(rows, (tokens, choices), device=setting.device)
    return indices, torch.randn(tokens, choices, device=setting.device).softmax(dim=-1)


def bag_work(
    tokens: int, rows: int, width: int, item: int, tables: int, named: int, all_rows: int
) -> tuple[Work, Work]:
    """Count what reading rows of tables takes, forward and with the backward.

    Every row that is named is read once forward and once backward, however many tokens name it:
    that is the least, with a cache that forgets nothing.

    Args:
        tokens: T.
        rows: rows read per token.
        width: numbers of a row.
        item: bytes of a number.
        tables: how many tables are read at the same rows.
        named: rows that are read.
        all_rows: rows of each table's gradient: all of them, or those that were read.
    """
    flops = 2.0 * tokens * rows * width * tables
    vectors = tokens * width * item
    once = named * width * item * tables
    forward = Work(flops, once + vectors * (tables - 1), vectors)
    written = (all_rows * width * tables + 2 * tokens * width) * item
    return forward, Work(3 * flops, 2 * once + vectors * tables, written)


def their_keys_as_ours(found: Gradients, heads: int) -> Gradients:
    """Turn gradients of query and keys from the layout of PEER-pytorch and product-key-memory.

    Theirs: queries as (half, head, feature), keys as (head, key, half, feature). Ours: queries as
    (head, half, feature), keys as (head, half, key, feature).
    """
    query = found["query"]
    ordered = query.unflatten(0, (2, heads, -1)).transpose(0, 1).reshape(query.shape)
    return {**found, "query": ordered, "keys": found["keys"].transpose(1, 2)}


def our_query_as_theirs(weight: Tensor, heads: int) -> Tensor:
    """Undo the reordering of :func:`their_keys_as_ours` for the query's weight."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(0, 1).reshape(weight.shape)
