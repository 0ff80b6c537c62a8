"""Mixtures whose router is linear, one token and one expert at a time.

Token choice with softmax or sigmoid scores, noise, groups, selection bias and capacity; expert
choice; σ-MoE; and CMoE, whose router is a neuron per expert. Random numbers are drawn in the order
in which a layer draws them, so that the same seed gives both the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from plain.parts import (
    Answer,
    Call,
    Experts,
    Options,
    Weights,
    activation,
    best,
    dense_block,
    sigmoid,
    softmax,
    stacked,
    tokens_of,
)
from torch import Tensor


def sparse_moe(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_{e chosen} g_e E_e(x) + Shared(x)`` (arXiv:1701.06538, eq. 1; 2401.06066, eq. 9)."""
    tokens, asking, real = tokens_of(hidden, call)
    computing = options["num_experts"]
    options = {**options, "num_experts": computing + options["num_identity_experts"]}
    route = _experts_choose if options["router"]["choice"] == "expert" else _tokens_choose
    gates, losses, counts = route(weights, options, hidden, asking, real, call)
    answer = Experts(weights, "experts.", options)
    of_shared = {**options, "glu": options["shared_glu"] or options["glu"]}
    rows = []
    for t, x_D in enumerate(tokens):
        y_D = torch.zeros_like(x_D)
        for e, gate in gates[t].items():
            if e >= computing:  # arXiv:2509.01322: it returns the token
                y_D = y_D + gate * x_D
            elif options["d_latent"] is None:
                y_D = y_D + gate * answer(e, x_D)
            else:
                read_L = weights["latent_down.weight"] @ x_D
                y_D = y_D + weights["latent_up.weight"] @ (gate * answer(e, read_L))
        if options["num_shared_experts"] and real[t]:
            shared_D = dense_block(weights, "shared_expert.", of_shared, x_D)
            if options["shared_gate"]:
                shared_D = sigmoid(weights["shared_expert_gate.weight"] @ x_D) * shared_D
            y_D = y_D + shared_D
        rows.append(y_D)
    return Answer(stacked(rows, hidden), losses, counts)


def _tokens_choose(
    weights: Weights,
    options: Options,
    hidden: Tensor,
    asking: Sequence[Tensor],
    real: Sequence[bool],
    call: Call,
) -> tuple[list[dict[int, Tensor]], dict[str, Tensor], list[int]]:
    """Return each token's gates by expert, the losses, and how many tokens want each expert."""
    router, capacity = options["router"], options["capacity"]
    experts, top_k = options["num_experts"], options["top_k"]
    size = (len(asking), experts)
    asking = _jittered(asking, router, call)
    noisy = call.training and router["noise"]
    noise = torch.randn(size, dtype=hidden.dtype) if noisy else None
    drop = router["expert_dropout"] if call.training else 0.0
    drawn = torch.rand(size, dtype=hidden.dtype) if drop else None

    clean, logits, spread, shares, chosen, gates = [], [], [], [], [], []
    for t, x_D in enumerate(asking):
        clean_E = logits_E = weights["gate.weight"] @ x_D
        if noise is not None:  # arXiv:1701.06538, eq. 4, with a floor of 0.01
            spread_E = torch.log(1 + torch.exp(weights["gate.noise_weight"] @ x_D)) + 0.01
            logits_E = clean_E + noise[t] * spread_E
            spread.append(spread_E)
        if router["score"] == "softmax":
            scores_E = share_E = softmax(logits_E)
        else:
            scores_E = sigmoid(logits_E)
            share_E = scores_E / (scores_E.sum() + 1e-20)
        if drawn is not None:
            scores_E = torch.where(drawn[t] < drop, 0.0, scores_E)
        wanted_E = scores_E.detach()
        if router["selection_bias"]:  # arXiv:2408.15664, eq. 3: it chooses, and weighs nothing
            wanted_E = wanted_E + weights["gate.selection_bias"].to(wanted_E.dtype)
        mine = best(_within_groups(wanted_E, router), top_k)
        total = sum(scores_E[e] for e in mine) if router["normalize"] else 1.0
        if router["normalize"] and router["score"] == "sigmoid":
            total = total + 1e-20
        gates.append({e: scores_E[e] / total * router["scale"] for e in mine if real[t]})
        chosen.append(mine if real[t] else [])
        clean.append(clean_E)
        logits.append(logits_E)
        shares.append(share_E)

    counts = _count(chosen, experts)
    losses = _losses(options, hidden, clean, shares, chosen, gates, real, call.earlier)
    if weight := options["balance"]["load"]:
        load_E = torch.tensor(counts, dtype=hidden.dtype)
        if noisy and top_k < experts:
            load_E = _expected_load(clean, logits, spread, top_k, real)
        losses["load"] = weight * _squared_variation(load_E)
    if capacity is not None:
        gates = _within_capacity(gates, chosen, sum(real), options, call.training)
    return gates, losses, counts


def _jittered(asking: Sequence[Tensor], router: Options, call: Call) -> Sequence[Tensor]:
    """Multiply what the router reads by random factors (arXiv:2101.03961, section 2.4)."""
    if not (call.training and router["jitter"]):
        return asking
    factors = torch.empty(len(asking), len(asking[0]), dtype=asking[0].dtype)
    factors.uniform_(1 - router["jitter"], 1 + router["jitter"])
    return [x_D * factor_D for x_D, factor_D in zip(asking, factors, strict=True)]


def _within_groups(wanted_E: Tensor, router: Options) -> Tensor:
    """Rule out what lies outside a token's best groups (arXiv:2405.04434, section 2.2)."""
    groups = router["num_groups"]
    size = len(wanted_E) // groups
    default = "sum_of_two" if router["selection_bias"] else "max"
    counted = 2 if (router["group_score"] or default) == "sum_of_two" else 1
    values = []
    for g in range(groups):
        members = sorted(wanted_E[g * size : (g + 1) * size].tolist(), reverse=True)
        values.append(sum(members[:counted]))
    open_groups = best(torch.tensor(values, dtype=wanted_E.dtype), router["top_groups"])
    closed = torch.tensor([e // size not in open_groups for e in range(len(wanted_E))])
    return wanted_E.masked_fill(closed, -math.inf)


def _within_capacity(
    gates: list[dict[int, Tensor]],
    chosen: list[list[int]],
    tokens: int,
    options: Options,
    training: bool,
) -> list[dict[int, Tensor]]:
    """Keep what experts have room for (arXiv:2006.16668, algorithm 1; 2101.03961, eq. 3)."""
    capacity, top_k = options["capacity"], options["top_k"]
    factor = Fraction(str(capacity["factor" if training else "eval_factor"]))
    room = max(capacity["minimum"], math.ceil(factor * top_k * tokens / options["num_experts"]))
    threshold = capacity["second_choice_threshold"] if training else 0.0
    drawn = torch.rand(len(chosen), top_k, dtype=torch.float64) if threshold else None
    taken = [0] * options["num_experts"]
    kept: list[dict[int, Tensor]] = [{} for _ in chosen]
    for place in range(top_k):  # all first choices before any second
        for t, mine in enumerate(chosen):
            if place >= len(mine):
                continue
            e = mine[place]
            if drawn is not None and place and drawn[t, place] >= gates[t][e] / threshold:
                continue
            if taken[e] < min(room, tokens):
                taken[e] += 1
                kept[t][e] = gates[t][e]
    return kept


def _losses(
    options: Options,
    hidden: Tensor,
    clean: list[Tensor],
    shares: list[Tensor],
    chosen: list[list[int]],
    gates: list[dict[int, Tensor]],
    real: Sequence[bool],
    earlier: list[int] | None,
) -> dict[str, Tensor]:
    balance, experts = options["balance"], options["num_experts"]
    everyone = [t for t in range(len(chosen)) if real[t]]
    losses = {}
    if weight := balance["load_balancing"]:
        first_only = balance["count"] == "first_choice"
        counts = _count([chosen[t][: 1 if first_only else None] for t in everyone], experts)
        if earlier is not None and balance["scope"] == "global" and not first_only:
            counts = [now + before for now, before in zip(counts, earlier, strict=True)]
        losses["load_balancing"] = weight * _switch_loss(counts, [shares[t] for t in everyone])
    if weight := balance["z_loss"]:
        losses["router_z"] = weight * z_loss([clean[t] for t in everyone])
    if weight := balance["sequence"]:  # arXiv:2412.19437, eq. 17-20
        length = hidden.shape[1] if hidden.ndim == 3 else len(chosen)
        of_sequences = []
        for first in range(0, len(chosen), length):
            members = [t for t in range(first, first + length) if real[t]]
            if members:
                counts = _count([chosen[t] for t in members], experts)
                of_sequences.append(_switch_loss(counts, [shares[t] for t in members]))
        losses["sequence_balance"] = weight * sum(of_sequences) / len(of_sequences)
    if weight := balance["entropy"]:
        losses["entropy"] = weight * negative_entropy([clean[t] for t in everyone])
    if weight := balance["importance"]:  # arXiv:1701.06538, eq. 6 and 7
        importance = [torch.zeros_like(clean[0][0]) for _ in range(experts)]
        for t in everyone:
            for e, gate in gates[t].items():
                importance[e] = importance[e] + gate
        losses["importance"] = weight * _squared_variation(torch.stack(importance))
    return losses


def _count(chosen: list[list[int]], experts: int) -> list[int]:
    return [sum(e in mine for mine in chosen) for e in range(experts)]


def _switch_loss(counts: list[int], shares: list[Tensor]) -> Tensor:
    """``E Σ_e f_e P_e`` (arXiv:2101.03961, eq. 4-6)."""
    mean_E = sum(shares) / len(shares)
    f = [count / sum(counts) for count in counts]
    return len(f) * sum(f[e] * mean_E[e] for e in range(len(f)))


def z_loss(logits: list[Tensor]) -> Tensor:
    """``1/T Σ_t (log Σ_e exp l_te)²`` (arXiv:2202.08906, eq. 5)."""
    return sum(torch.log(torch.exp(logits_E).sum()) ** 2 for logits_E in logits) / len(logits)


def negative_entropy(logits: list[Tensor]) -> Tensor:
    """``Σ_e p_e log p_e`` of the mean softmax (arXiv:2310.10837, section 5)."""
    mean_E = sum(softmax(logits_E) for logits_E in logits) / len(logits)
    return (mean_E * torch.log(mean_E)).sum()


def _squared_variation(x_E: Tensor) -> Tensor:
    mean = x_E.sum() / len(x_E)
    return ((x_E - mean) ** 2).sum() / len(x_E) / (mean**2 + 1e-10)


def _expected_load(
    clean: list[Tensor],
    noisy: list[Tensor],
    spread: list[Tensor],
    top_k: int,
    real: Sequence[bool],
) -> Tensor:
    """Sum up the probability that e is chosen if only its noise is redrawn (eq. 8 and 9)."""
    load = [torch.zeros_like(clean[0][0]) for _ in clean[0]]
    for t in range(len(clean)):
        if not real[t]:
            continue
        for e in range(len(load)):
            others = sorted((noisy[t][o] for o in range(len(load)) if o != e), reverse=True)
            z = (clean[t][e] - others[top_k - 1]) / spread[t][e]
            load[e] = load[e] + (1 + torch.erf(z / math.sqrt(2))) / 2
    return torch.stack(load)


def _experts_choose(
    weights: Weights,
    options: Options,
    hidden: Tensor,
    asking: Sequence[Tensor],
    real: Sequence[bool],
    call: Call,
) -> tuple[list[dict[int, Tensor]], dict[str, Tensor], list[int]]:
    """Let each expert take its ``T k / E`` best tokens (arXiv:2202.09368, section 3.2)."""
    asking = _jittered(asking, options["router"], call)
    logits = [weights["gate.weight"] @ x_D for x_D in asking]
    scores = [softmax(logits_E) for logits_E in logits]
    everyone = [t for t in range(len(asking)) if real[t]]
    experts = options["num_experts"]
    room = min(len(everyone), math.ceil(Fraction(len(everyone) * options["top_k"], experts)))
    gates: list[dict[int, Tensor]] = [{} for _ in asking]
    for e in range(experts):
        ranking = sorted(everyone, key=lambda t, e=e: scores[t][e].item(), reverse=True)
        for t in ranking[:room]:
            gates[t][e] = scores[t][e] * options["router"]["scale"]
    losses = {}
    if weight := options["balance"]["z_loss"]:
        losses["router_z"] = weight * z_loss([logits[t] for t in everyone])
    return gates, losses, [room] * experts


def sigma_moe(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_{e in topK(s)} s_e W2_e act(W1_e x)``, ``s = σ(W3 x) m`` (arXiv:2310.10837, 5)."""
    tokens, asking, real = tokens_of(hidden, call)
    experts, dropout = options["num_experts"], options["expert_dropout"]
    drawn = None
    if call.training and dropout:
        drawn = torch.rand(len(tokens), experts, dtype=hidden.dtype)
    answer = Experts(weights, "experts.", options)
    rows, logits, counts = [], [], [0] * experts
    for t, x_D in enumerate(tokens):
        logits_E = weights["gate.weight"] @ asking[t]
        scores_E = sigmoid(logits_E)
        if drawn is not None:
            scores_E = scores_E * (drawn[t] >= dropout)
        y_D = torch.zeros_like(x_D)
        if real[t]:
            logits.append(logits_E)
            for e in best(scores_E, options["top_k"]):
                y_D = y_D + scores_E[e] * answer(e, x_D)
                counts[e] += 1
        rows.append(y_D)
    losses = {}
    if options["entropy"]:
        losses["entropy"] = options["entropy"] * negative_entropy(logits)
    return Answer(stacked(rows, hidden), losses, counts)


def carved_moe(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Shared(x) + Σ_{e in topK(s' + b)} (1 + s'_e u_e) E_e(x)`` (arXiv:2502.04416, 4.4)."""
    tokens, asking, real = tokens_of(hidden, call)
    answer = Experts(weights, "experts.", options)
    rows, counts = [], [0] * options["num_experts"]
    for t, x_D in enumerate(tokens):
        y_D = torch.zeros_like(x_D)
        if not real[t]:
            rows.append(y_D)
            continue
        score_E = weights["gate.weight"] @ asking[t]
        if "gate.bias" in weights:
            score_E = score_E + weights["gate.bias"]
        if options["router"] == "neuron":  # eq. 8
            score_E = activation(options["activation"], score_E)
            if options["gated"]:
                score_E = score_E * (weights["gate.up_weight"] @ asking[t])
            if not options["signed"]:
                score_E = torch.where(score_E < 0, -score_E, score_E)
        share_E = softmax(score_E)
        wanted_E = share_E.detach() + weights["gate.selection_bias"].to(share_E.dtype)
        for e in best(wanted_E, options["top_k"]):
            y_D = y_D + (1 + share_E[e] * weights["u"][e]) * answer(e, x_D)
            counts[e] += 1
        if options["num_shared_experts"]:
            y_D = y_D + dense_block(weights, "shared_expert.", options, x_D)
        if options["output_bias"]:
            y_D = y_D + weights["b_out"]
        rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, counts)
