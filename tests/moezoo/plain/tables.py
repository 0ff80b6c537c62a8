"""Layers whose rows token ids address, one token after the other."""

from __future__ import annotations

import torch
from plain.parts import (
    Answer,
    Call,
    Experts,
    Options,
    Weights,
    activation,
    dense_block,
    softmax,
    stacked,
    tokens_of,
)
from torch import Tensor


def stem(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = W_down (act(W_gate h) * U[x])`` (arXiv:2601.10639, section 3)."""
    tokens, _, real = tokens_of(hidden, call)
    names = call.token_ids.reshape(-1).tolist()
    rows, counts = [], [0] * options["vocab_size"]
    for x_D, name, is_real in zip(tokens, names, real, strict=True):
        if not is_real:
            rows.append(torch.zeros_like(x_D))
            continue
        counts[name] += 1
        gate_F = activation(options["activation"], weights["gate_proj.weight"] @ x_D)
        rows.append(weights["down_proj.weight"] @ (gate_F * weights["table.weight"][name]))
    return Answer(stacked(rows, hidden), {}, counts)


def mole(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Shared(h) + Σ_e softmax(W_r h)_e E_e(RMSNorm(v[x]))`` (arXiv:2503.15798, section 3)."""
    tokens, _, real = tokens_of(hidden, call)
    names = call.token_ids.reshape(-1).tolist()
    number = options["num_experts"]
    answer = None if options["folded"] else Experts(weights, "experts.", options)
    rows = []
    for x_D, name, is_real in zip(tokens, names, real, strict=True):
        if not is_real:
            rows.append(torch.zeros_like(x_D))
            continue
        y_D = dense_block(weights, "shared.", options, x_D)
        share_E = softmax(weights["gate.weight"] @ x_D)
        for e in range(number):
            if answer is None:
                y_D = y_D + share_E[e] * weights["table.weight"][name * number + e]
                continue
            v_D = weights["embedding.weight"][name]
            v_D = v_D / torch.sqrt((v_D**2).sum() / len(v_D) + 1e-6) * weights["norm.weight"]
            y_D = y_D + share_E[e] * answer(e, v_D)
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, [sum(real)] * number)
