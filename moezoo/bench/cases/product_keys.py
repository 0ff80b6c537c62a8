"""Exact top-k over n² product keys, from the scores of both half-queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
from moezoo.bench.inputs import decided, halves_margin
from moezoo_kernels import product_key_top_k


@dataclass(frozen=True)
class _Search:
    """Scores ``(2, T, H, n)``, how many are wanted, and how ours is called."""

    halves: Tensor
    top_k: int
    ours: Contender


def _build(setting: Setting) -> Problem:
    tokens, heads, n, k = (setting[name] for name in ("T", "h", "n", "k"))
    halves = decided(
        lambda count: torch.randn(count, 2, heads, n, device=setting.device),
        lambda drawn: halves_margin(drawn, k),
        tokens,
    )
    halves = halves.transpose(0, 1).contiguous().requires_grad_()
    ours = Contender(lambda: product_key_top_k(halves, k)[0], {"halves": halves})
    # The same for all k of a head: two slots that tie to the last bit may come in either order.
    direction = torch.randn(tokens, heads, 1, device=setting.device).expand(-1, -1, k)
    # A search has no products. A score and a slot are written for each that is found.
    work = Work(0, halves.nbytes, 12.0 * tokens * heads * k)
    step_work = Work(0, work.read, work.written + halves.nbytes)
    return Problem(ours, work, step_work, _Search(halves, k, ours), direction.contiguous())


def _plain(parts: _Search) -> Contender:
    return plain_torch(parts.ours, "product_key_top_k")


def _topk(parts: _Search) -> Contender:
    """Top-k of each half, all k² sums, top-k of those; a slot's number along with its score."""
    halves, k = parts.halves, parts.top_k

    def forward() -> Tensor:
        (first, second), (rows, columns) = halves.topk(k, dim=-1)
        sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
        slots = (rows.unsqueeze(-1) * halves.shape[-1] + columns.unsqueeze(-2)).flatten(-2)
        best, chosen = sums.topk(k, dim=-1)
        slots.gather(-1, chosen)
        return best

    return Contender(forward, parts.ours.operands)


def _case(device: Literal["cpu", "cuda"], n: int, k: int, suffix: str = "") -> Case:
    target = Target(forward=5.0) if device == "cpu" else None
    return Case(
        f"top-k-n{n}-k{k}{suffix}",
        "op",
        "product-key top-k",
        {"T": 2048, "h": 4, "k": k, "n": n},
        {"T": 16, "h": 2, "k": 3, "n": 8},
        _build,
        {"torch.topk": Peer(_topk, target=target), PLAIN: Peer(_plain)},
        device=device,
        step=False,
        series=f"product-key top-{k}: half-keys n",
        size="n",
        ops=("product_key_top_k",),
    )


CASES = [
    *(_case("cpu", n, k) for k in (16, 32) for n in (256, 512, 1024)),
    *(_case("cuda", n, 32, "-cuda") for n in (256, 512, 1024)),
]
