"""Product keys by comparing with all n² of them: PKM, Memory+ and PEER."""

from __future__ import annotations

import math

import torch
from plain.parts import (
    Answer,
    Call,
    Options,
    Weights,
    activation,
    best,
    sigmoid,
    softmax,
    stacked,
    tokens_of,
)
from torch import Tensor


class _Found(list):
    """Per token, the pairs of slot and weight that its heads ask for."""

    counts: list[int]
    state: dict[str, Tensor]


def _look_up(
    weights: Weights, prefix: str, options: Options, hidden: Tensor, call: Call, shared: bool
) -> _Found:
    """Score all slots for each head's query (arXiv:1907.05242, eq. 1-4).

    Slot ``i n + j`` has the key ``[K1_i; K2_j]``; the k best of a head share a softmax.
    """
    _, asking, real = tokens_of(hidden, call)
    heads, top_k = options["num_heads"], options["top_k"]
    keys = weights[f"{prefix}keys.keys"]
    if options["query_norm"] == "qk":
        keys = math.sqrt(0.5) * keys / torch.sqrt((keys**2).sum(dim=-1, keepdim=True))
    side, half = keys.shape[2], keys.shape[3]
    queries, state = _queries(weights, f"{prefix}query.", options, asking, real, call.training)
    found = _Found()
    found.counts, found.state = [0] * side**2, state
    for query_F, is_real in zip(queries, real, strict=True):
        pairs: list[tuple[int, Tensor]] = []
        for h in range(heads if is_real else 0):
            first_nC, second_nC = keys[0 if shared else h]
            query_C = query_F[h * 2 * half : (h + 1) * 2 * half]
            first_n, second_n = first_nC @ query_C[:half], second_nC @ query_C[half:]
            scores_N = torch.stack([first_n[i] + second_n for i in range(side)]).reshape(-1)
            slots = best(scores_N, top_k)
            kind = options.get("score_fn", "softmax")
            scores_K = scores_N[slots]
            if kind == "softmax":
                gates_K = softmax(scores_K)
            else:
                gates_K = sigmoid(scores_K) if kind == "sigmoid" else activation("relu", scores_K)
            pairs += zip(slots, gates_K, strict=True)
        found.append(pairs)
        for slot, _ in pairs:
            found.counts[slot] += 1
    return found


def _queries(
    weights: Weights,
    prefix: str,
    options: Options,
    asking: list[Tensor],
    real: list[bool],
    training: bool,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the queries of each token's heads, one behind another, and moved averages."""
    projected = [weights[f"{prefix}proj.weight"] @ x_D for x_D in asking]
    if f"{prefix}proj.bias" in weights:
        projected = [q_F + weights[f"{prefix}proj.bias"] for q_F in projected]
    norm, heads, state = options["query_norm"], options["num_heads"], {}
    if norm == "none":
        return projected, state
    if norm == "batch":
        averages = (weights[f"{prefix}running_mean"], weights[f"{prefix}running_var"])
        mean_F, var_F = (average.to(asking[0].dtype) for average in averages)
        members = [q_F for q_F, is_real in zip(projected, real, strict=True) if is_real]
        if training and len(members) > 1:
            batch_F = sum(members) / len(members)
            squares_F = sum((q_F - batch_F) ** 2 for q_F in members)
            moved = (mean_F, batch_F), (var_F, squares_F / (len(members) - 1))
            state = {
                f"{prefix}running_{name}": (0.9 * old + 0.1 * new).detach()
                for name, (old, new) in zip(("mean", "var"), moved, strict=True)
            }
            mean_F, var_F = batch_F, squares_F / len(members)
        normed = [(q_F - mean_F) / torch.sqrt(var_F + 1e-5) for q_F in projected]
    else:
        normed = [
            torch.cat([_normed(q_C, centre=norm == "layer") for q_C in q_F.chunk(heads)])
            for q_F in projected
        ]
    gained = [q_F * weights[f"{prefix}gain"] for q_F in normed]
    if norm == "qk":
        return gained, state
    return [q_F + weights[f"{prefix}shift"] for q_F in gained], state


def _normed(query_C: Tensor, centre: bool) -> Tensor:
    if centre:
        query_C = query_C - query_C.sum() / len(query_C)
    return query_C / torch.sqrt((query_C**2).sum() / len(query_C) + 1e-5)


def _read(weights: Weights, found: _Found) -> list[Tensor]:
    """Sum up the weighted values that each token's heads ask for."""
    values = weights["memory.values.weight"]
    rows = []
    for pairs in found:
        y_V = torch.zeros_like(values[0])
        if pairs:
            gates = torch.stack([gate for _, gate in pairs])
            y_V = gates @ values[[slot for slot, _ in pairs]]
        rows.append(y_V)
    return rows


def product_key_memory(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_h Σ_{i in I_h} w_i V_i`` (arXiv:1907.05242, eq. 2-4)."""
    found = _look_up(weights, "memory.", options, hidden, call, shared=False)
    rows = _read(weights, found)
    if "out_proj.weight" in weights:
        rows = [weights["out_proj.weight"] @ y_V for y_V in rows]
    return Answer(stacked(rows, hidden), {}, found.counts, found.state)


def memory_plus(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = (m(x) * silu(x W_1)) W_2`` (arXiv:2412.09764, section 3)."""
    tokens, _, _ = tokens_of(hidden, call)
    found = _look_up(weights, "memory.", options, hidden, call, shared=False)
    rows = []
    for x_D, y_V in zip(tokens, _read(weights, found), strict=True):
        gate_V = activation("silu", weights["gate_proj.weight"] @ x_D)
        rows.append(weights["out_proj.weight"] @ (y_V * gate_V))
    return Answer(stacked(rows, hidden), {}, found.counts, found.state)


def peer(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_h Σ_{i in I_h} g_i act(u_i · x) v_i`` (arXiv:2407.04153, algorithm 1)."""
    tokens, _, _ = tokens_of(hidden, call)
    found = _look_up(weights, "", options, hidden, call, shared=options["share_keys"])
    rows = []
    for x_D, pairs in zip(tokens, found, strict=True):
        y_D = torch.zeros_like(x_D)
        if pairs:
            asked = [expert for expert, _ in pairs]
            inner_J = weights["experts.u"][asked] @ x_D
            if options["gated"]:
                gate_J = weights["experts.gate"][asked] @ x_D
                inner_J = activation(options["activation"], gate_J) * inner_J
            else:
                inner_J = activation(options["activation"], inner_J)
            y_D = (torch.stack([g for _, g in pairs]) * inner_J) @ weights["experts.v"][asked]
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, found.counts, found.state)
