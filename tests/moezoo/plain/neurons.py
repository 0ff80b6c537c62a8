"""Blocks in which a token's strongest neurons answer, by rank or by a threshold."""

from __future__ import annotations

from statistics import NormalDist

import torch
from plain.parts import Answer, Call, Options, Weights, activation, best, stacked, tokens_of
from torch import Tensor


def top_k_ffn(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = W_down topk(act(W_up x))`` (arXiv:2210.06313, section 4), or Spark's threshold.

    Statistical selection is ``act(max(u - θ, 0))`` with ``θ = mean(u) + std(u) Φ⁻¹(1 - k / F)``
    (arXiv:2506.06644, eq. 5-8), u the gate's pre-activations where there is a gate.
    """
    tokens, asking, real = tokens_of(hidden, call)
    exact, name = options["selection"] == "exact", options["activation"]
    columns = weights["down_proj.weight"]
    rows, counts = [], [0] * columns.shape[1]
    for x_D, asks_D, is_real in zip(tokens, asking, real, strict=True):
        gate_F, up_F = _branches(weights, options, x_D)
        asked_gate_F, asked_up_F = (u_F.detach() for u_F in _branches(weights, options, asks_D))
        if exact:
            inner_F, strength_F = activation(name, gate_F), activation(name, asked_gate_F)
            if options["gated"]:
                inner_F, strength_F = inner_F * up_F, strength_F * asked_up_F
            strength_F = strength_F.abs()
            if options["rank"] == "contribution":
                strength_F = strength_F * torch.sqrt((columns.detach() ** 2).sum(dim=0))
            kept = best(strength_F, options["top_k"])
        else:
            inner_F = activation(name, _excess(gate_F, options["top_k"]))
            if options["gated"]:
                inner_F = inner_F * up_F
            kept = [int(f) for f in (_excess(asked_gate_F, options["top_k"]) > 0).nonzero()]
        y_D = torch.zeros_like(x_D)
        for f in kept:
            y_D = y_D + inner_F[f] * columns[:, f]
            counts[f] += is_real and bool(inner_F[f] != 0)
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, counts)


def _branches(weights: Weights, options: Options, x_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pre-activations that select, and the linear branch, which may be the same."""
    if not options["gated"]:
        up_F = weights["up_proj.weight"] @ x_D
        return up_F, up_F
    half = len(x_D) // 2
    for_gate, for_up = (x_D[:half], x_D[half:]) if options["split_input"] else (x_D, x_D)
    return weights["gate_proj.weight"] @ for_gate, weights["up_proj.weight"] @ for_up


def _excess(u_F: Tensor, top_k: int) -> Tensor:
    size = len(u_F)
    mean = u_F.sum() / size
    deviation = torch.sqrt(((u_F - mean) ** 2).sum() / size)
    return u_F - (mean + deviation * NormalDist().inv_cdf(1 - top_k / size))
