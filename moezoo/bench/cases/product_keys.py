"""Exact top-k over n² product keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo.bench.inputs import decided, product_key_margin
from moezoo.routing.product_key import ProductKeys


@dataclass(frozen=True)
class _Search:
    """Keys, queries, and how ours is called."""

    keys: ProductKeys
    queries: Tensor
    ours: Contender


def _build(setting: Setting) -> Problem:
    """Narrow keys, so that little of the time is the product of queries and keys."""
    tokens, heads, k = setting["T"], setting["h"], setting["k"]
    with torch.device(setting.device):
        keys = ProductKeys(setting["c"], setting["n"], heads, k)
    queries = decided(
        lambda count: torch.randn(count, heads, setting["c"], device=setting.device),
        lambda drawn: product_key_margin(keys, drawn),
        tokens,
    ).requires_grad_()
    ours = Contender(lambda: keys(queries)[0], {"queries": queries, "keys": keys.keys})
    # The same for all k of a head: two slots that tie to the last bit may come in either order.
    direction = torch.randn(tokens, heads, 1, device=setting.device).expand(-1, -1, k)
    scores = 4.0 * tokens * heads * 2 * setting["n"]
    flops = float(tokens * keys.flops_per_token())
    found = 12.0 * tokens * heads * k  # a score and a slot each
    work = Work(flops, queries.nbytes + keys.keys.nbytes + scores, found + scores)
    step_work = Work(3 * flops, 2 * work.read, work.written + queries.nbytes + keys.keys.nbytes)
    return Problem(ours, work, step_work, _Search(keys, queries, ours), direction.contiguous())


def _plain(parts: _Search) -> Contender:
    return plain_torch(parts.ours, "product_key_top_k")


def _topk(parts: _Search) -> Contender:
    """Top-k of each half, all k² sums, top-k of those; a slot's number along with its score."""
    keys, queries = parts.keys, parts.queries
    codebooks = keys.keys

    def forward() -> Tensor:
        scores = torch.einsum("thpc,hpnc->pthn", queries.unflatten(-1, (2, -1)), codebooks)
        (first, second), (rows, columns) = scores.topk(keys.top_k, dim=-1)
        sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
        slots = (rows.unsqueeze(-1) * keys.num_keys + columns.unsqueeze(-2)).flatten(-2)
        best, chosen = sums.topk(keys.top_k, dim=-1)
        slots.gather(-1, chosen)
        return best

    return Contender(forward, parts.ours.operands)


def _case(device: Literal["cpu", "cuda"], n: int, k: int, suffix: str = "") -> Case:
    target = Target(forward=5.0) if device == "cpu" else None
    peers: dict[str, Any] = {
        "torch.topk": Peer(_topk, target=target),
        PLAIN: Peer(_plain),
    }
    return Case(
        f"top-k-n{n}-k{k}{suffix}",
        "op",
        "product-key top-k",
        {"T": 2048, "h": 4, "k": k, "n": n, "c": 16},
        {"T": 16, "h": 2, "k": 3, "n": 8, "c": 8},
        _build,
        peers,
        device=device,
        step=False,
        series=f"product-key top-{k}: half-keys n",
        size="n",
    )


CASES = [
    *(_case("cpu", n, k) for k in (16, 32) for n in (256, 512, 1024)),
    *(_case("cuda", n, 32, "-cuda") for n in (256, 512, 1024)),
]
