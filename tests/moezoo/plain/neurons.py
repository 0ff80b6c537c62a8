"""Blocks in which a token's strongest neurons answer, by rank or by a threshold."""

from __future__ import annotations

from statistics import NormalDist

import torch
from plain.parts import (
    Answer,
    Call,
    Options,
    Weights,
    activation,
    best,
    gate_factor,
    gated_unit,
    stacked,
    tokens_of,
)
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


def selective_ffn(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = W_down h``, of inputs, gates and hidden values those above their thresholds.

    CATS (arXiv:2404.08763, eq. 5) has one on the gates, TEAL (arXiv:2408.14690, eq. 3) one on what
    each matrix multiplies; R-Sparse (arXiv:2504.19449, eq. 4) passes what is not kept through low
    rank factors. Deja Vu (arXiv:2310.17157, section 4.1) computes the neurons of the best scores.
    The first tokens of a document read all.
    """
    tokens, _, real = tokens_of(hidden, call)
    places = [None] * len(tokens) if call.positions is None else call.positions.reshape(-1).tolist()
    width = weights["down_proj.weight"].shape[1]
    rule = options["selection"]
    guessed = rule["kind"] == "predictor"
    rows, counts = [], [0] * width
    for x_D, place, is_real in zip(tokens, places, real, strict=True):
        dense = place is not None and place < options["first_tokens"]

        def large(value: Tensor, name: str, dense: bool = dense) -> Tensor:
            if guessed:
                return torch.ones(len(value), dtype=torch.bool)
            return (value.abs() > weights[f"selector.{name}"]) | dense

        def rest(name: str, values: Tensor) -> Tensor | float:
            if guessed or not rule["remainder"]:
                return 0.0
            inner_R = weights[f"selector.factors.{name}.right"] @ values
            return weights[f"selector.factors.{name}.left"] @ inner_R

        def products(name: str, which: str, x_D: Tensor = x_D) -> Tensor:
            read = large(x_D, which)
            made_F = weights[f"{name}_proj.weight"][:, read] @ x_D[read]
            made_F = made_F + rest(name, torch.where(read, 0.0, x_D))
            bias = weights.get(f"{name}_proj.bias")
            return made_F if bias is None else made_F + bias

        chosen_F = torch.ones(width, dtype=torch.bool)
        if guessed and not dense:
            best_K = _guessed(weights, options, x_D.detach())
            chosen_F = torch.tensor([f in best_K for f in range(width)])
        if options["gated"]:
            gate_F, up_F = products("gate", "input"), products("up", "up_input")
            value_F = gated_unit(options["activation"], gate_F, up_F, options["glu"])
            factor_F = gate_factor(options["activation"], gate_F, options["glu"])
            chosen_F = chosen_F & large(factor_F, "gate")
        else:
            value_F = activation(options["activation"], products("up", "input"))
        kept_F = chosen_F & large(value_F, "hidden")
        y_D = torch.zeros_like(x_D) + rest("down", torch.where(chosen_F & ~kept_F, value_F, 0.0))
        for i in kept_F.nonzero().flatten().tolist():
            y_D = y_D + value_F[i] * weights["down_proj.weight"][:, i]
            counts[i] += is_real and bool(value_F[i] != 0)
        if "down_proj.bias" in weights:
            y_D = y_D + weights["down_proj.bias"]
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, counts)


def _guessed(weights: Weights, options: Options, x_D: Tensor) -> list[int]:
    """Return the neurons with the best scores of a low-rank map."""
    rule = options["selection"]
    inner_R = weights["selector.reduce"] @ x_D
    if rule["norm"]:
        mean = inner_R.sum() / len(inner_R)
        variance = ((inner_R - mean) ** 2).sum() / len(inner_R)
        inner_R = (inner_R - mean) / torch.sqrt(variance + 1e-5)
    score_F = weights["selector.expand"] @ inner_R + weights["selector.bias"]
    if rule["score"] == "gate":
        value_F = gate_factor(options["activation"], score_F, options["glu"])
        score_F = torch.sqrt(value_F**2) * weights["selector.length"]
    return best(score_F, rule["top_k"] or len(score_F) // 2)
