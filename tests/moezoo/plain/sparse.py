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
    gated_unit,
    sigmoid,
    softmax,
    stacked,
    tokens_of,
)
from torch import Tensor


def sparse_moe(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = Σ_{e chosen} g_e E_e(x) + Shared(x)`` (arXiv:1701.06538, eq. 1; 2401.06066, eq. 9)."""
    tokens, asking, real = tokens_of(hidden, call)
    if options["router"]["jitter_experts"] and call.training:
        factors = _jitter(asking, options["router"])
        tokens = [x_D * factor_D for x_D, factor_D in zip(tokens, factors, strict=True)]
        asking = [x_D * factor_D for x_D, factor_D in zip(asking, factors, strict=True)]
    computing = options["num_experts"]
    returning = computing + options["num_identity_experts"]
    options = {**options, "num_experts": returning + options["num_skip_experts"]}
    call = call._replace(handed=[])
    route = {"expert": _experts_choose, "threshold": _thresholds_choose, "token": _tokens_choose}[
        options["router"]["choice"]
    ]
    if options["router"]["score"] == "relu":
        route = _positive_scores_choose
    gates, losses, counts = route(weights, options, hidden, asking, real, call)
    weighed = options["router"]["weights"]["with_shared"]
    answer = Experts(weights, "experts.", options)
    of_shared = {**options, "glu": options["shared_glu"] or options["glu"]}
    rows = []
    for t, x_D in enumerate(tokens):
        y_D = torch.zeros_like(x_D)
        for e, gate in gates[t].items():
            if computing <= e < returning:  # arXiv:2509.01322: it returns the token
                y_D = y_D + gate * x_D
            elif 0 <= e < computing:
                y_D = y_D + _routed(weights, options, answer, e, gate, x_D)
        if weighed and real[t]:
            for number in range(options["num_shared_experts"]):
                shared_D = _shared_expert(weights, of_shared, number, x_D)
                y_D = y_D + gates[t][-1 - number] * shared_D
        elif options["num_shared_experts"] and real[t]:
            shared_D = dense_block(weights, "shared_expert.", of_shared, x_D)
            if options["shared_gate"]:
                shared_D = sigmoid(weights["shared_expert_gate.weight"] @ x_D) * shared_D
            y_D = y_D + shared_D
        rows.append(y_D)
    handed = None
    if call.handed:
        handed = torch.stack(call.handed).reshape(*hidden.shape[:-1], -1)
    return Answer(stacked(rows, hidden), losses, counts, router_state=handed)


def _routed(
    weights: Weights, options: Options, answer: Experts, e: int, gate: Tensor, x_D: Tensor
) -> Tensor:
    """Return what a routed expert adds: weighed before or after, between the latent maps."""
    of_input = options["router"]["weights"]["apply_to"] == "input"
    read = gate * x_D if of_input else x_D
    if options["d_latent"] is not None:
        read = weights["latent_down.weight"] @ read
    norms = options["expert_norms"]
    if norms["input"]:
        read = _by_rms(read, norms["input_eps"]) * (1 + weights["input_norm.weight"])
    found = answer(e, read)
    if norms["output"]:
        found = _by_rms(found * (1 + weights["output_norm.weight"]), norms["output_eps"])
    added = found if of_input else gate * found
    return added if options["d_latent"] is None else weights["latent_up.weight"] @ added


def _by_rms(x: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum() / len(x) + eps) ** 0.5


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

    clean, logits, spread, shares, chosen, gates, wanted = [], [], [], [], [], [], []
    scores = []
    for t, x_D in enumerate(asking):
        x_D = _router_input(weights, router["logits"], x_D, call, t)
        clean_E = logits_E = _logits(weights, router["logits"], x_D)
        if noise is not None:  # arXiv:1701.06538, eq. 4, with a floor of 0.01
            spread_E = torch.log(1 + torch.exp(weights["gate.noise_weight"] @ x_D)) + 0.01
            logits_E = clean_E + noise[t] * spread_E
            spread.append(spread_E)
        if router["score"] in ("softmax", "sparse_mixer"):
            scores_E = share_E = softmax(logits_E)
        else:
            scores_E = _score(logits_E, router)
            share_E = scores_E / (scores_E.sum() + 1e-20)
        if drawn is not None:
            scores_E = torch.where(drawn[t] < drop, 0.0, scores_E)
        wanted_E = (scores_E if router["select_on"] == "score" else logits_E).detach()
        if router["selection_bias"]:  # arXiv:2408.15664, eq. 3: it chooses, and weighs nothing
            wanted_E = wanted_E + weights["gate.selection_bias"].to(wanted_E.dtype)
        mine = best(_within_groups(wanted_E, router), top_k)
        raw = {e: scores_E[e] for e in mine}
        if router["weights"]["with_shared"]:  # shared experts are -1, -2 and so on
            for number in range(options["num_shared_experts"]):
                logit = weights["gate.shared_weight"][number] @ x_D
                raw[-1 - number] = _score(_scaled(logit, router["logits"]), router)
        gates.append(_weighed(weights, router, raw) if real[t] else {})
        wanted.append((mine, raw) if real[t] else ([], {}))
        chosen.append(mine if real[t] else [])
        clean.append(clean_E)
        logits.append(logits_E)
        shares.append(share_E)
        scores.append(scores_E)

    if router["score"] == "sparse_mixer":
        mixed = _mixed(logits, top_k, router["mixer_eps"], call.training)
        chosen = [list(raw) if real[t] else [] for t, raw in enumerate(mixed)]
        gates = [_weighed(weights, router, raw) if real[t] else {} for t, raw in enumerate(mixed)]
        wanted = [(list(raw), raw) if real[t] else ([], {}) for t, raw in enumerate(mixed)]
    counts = _count(chosen, experts)
    losses = _losses(options, hidden, clean, shares, chosen, gates, real, call.earlier)
    if weight := options["balance"]["load"]:
        load_E = torch.tensor(counts, dtype=hidden.dtype)
        if noisy and top_k < experts:
            load_E = _expected_load(clean, logits, spread, top_k, real)
        losses["load"] = weight * _squared_variation(load_E)
    if capacity is not None:
        length = hidden.shape[1] if hidden.ndim == 3 else len(chosen)
        gates = _within_capacity(weights, options, wanted, gates, length, call.training)
    if router["rounding"] and call.training:
        raw = {**router, "normalize": False}
        alone = [_weighed(weights, raw, dict(enumerate(scores_E))) for scores_E in scores]
        gates = _rounded(router["rounding"], gates, alone, scores, real)
    return gates, losses, counts


def _rounded(
    multiple: int,
    gates: list[dict[int, Tensor]],
    alone: list[dict[int, Tensor]],
    scores: list[Tensor],
    real: Sequence[bool],
) -> list[dict[int, Tensor]]:
    """Bring each expert's number of tokens to the nearest multiple (arXiv:2512.14080).

    ``alone`` has the gates of tokens that did not choose an expert and come to it.
    """
    rounded: list[dict[int, Tensor]] = [{} for _ in gates]
    for e in range(len(scores[0])):
        mine = [t for t in range(len(gates)) if e in gates[t]]
        others = [t for t in range(len(gates)) if e not in gates[t] and real[t]]
        mine.sort(key=lambda t, e=e: -abs(gates[t][e].item()))
        others.sort(key=lambda t, e=e: -scores[t][e].item())
        room = multiple * round(Fraction(len(mine), multiple))  # of two equally near, the even one
        for t in mine[:room]:
            rounded[t][e] = gates[t][e]
        for t in others[: max(room - len(mine), 0)]:
            rounded[t][e] = alone[t][e]
    return rounded


def _router_input(weights: Weights, options: Options, x_D: Tensor, call: Call, t: int) -> Tensor:
    """Return what the linear map reads: normalised as by Gemma 4, through an MLP as in ZAYA.

    ZAYA's state is the MLP's first product, to which the state of the layer before is added.
    """
    eps = options["norm_eps"]
    if options["norm"]:
        x_D = _by_rms(x_D, eps) * weights["gate.input_scale"] / math.sqrt(len(x_D))
    if options["mlp"]:
        parts = {n: weights[f"gate.mlp.{n}.weight"] for n in ("down", "fc1", "fc2")}
        biases = {n: weights[f"gate.mlp.{n}.bias"] for n in parts}
        state_R = parts["down"] @ x_D + biases["down"]
        if options["carry"] and call.router_state is not None:
            before_R = call.router_state.reshape(-1, len(state_R))[t]
            state_R = state_R + before_R * weights["gate.mlp.state_scale"]
        assert call.handed is not None
        call.handed.append(state_R)
        x_D = _by_rms(state_R, eps) * weights["gate.mlp.norm_scale"]
        for name in ("fc1", "fc2"):
            x_D = activation("gelu", parts[name] @ x_D + biases[name])
    return x_D


def _logits(weights: Weights, options: Options, x_D: Tensor) -> Tensor:
    logits_E = weights["gate.weight"] @ x_D
    if options["bias"]:
        logits_E = logits_E + weights["gate.bias"]
    return _scaled(logits_E, options)


def _scaled(logits: Tensor, options: Options) -> Tensor:
    logits = logits * options["scale"]
    if cap := options["softcap"]:
        powers = torch.exp(2 * logits / cap)
        logits = cap * (powers - 1) / (powers + 1)
    return logits


def _score(logits: Tensor, router: Options) -> Tensor:
    if router["score"] == "sigmoid":
        return sigmoid(logits)
    return torch.log(1 + torch.exp(logits)) ** 0.5


def _weighed(weights: Weights, router: Options, raw: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the weights of a token's experts; shared ones, if any, have numbers below zero."""
    how, total = router["weights"], 1.0
    if router["normalize"]:
        total = sum(score ** how["p"] for score in raw.values()) ** (1 / how["p"])
        if total < how["minimum"]:
            total = how["minimum"]
        eps = 0.0 if router["score"] == "softmax" else 1e-20
        total = total + (eps if how["eps"] is None else how["eps"])
    gates = {e: score / total * router["scale"] for e, score in raw.items()}
    if how["learned_scale"]:
        gates = {e: gate * weights["gate.learned_scale"][0] for e, gate in gates.items()}
    if how["expert_scale"]:
        scales = weights["gate.expert_scale"]
        gates = {e: gate * scales[e] if e >= 0 else gate for e, gate in gates.items()}
    return gates


def _shared_expert(weights: Weights, options: Options, number: int, x_D: Tensor) -> Tensor:
    """Apply one of the shared experts, whose neurons lie side by side in one block."""
    width = options["d_shared"] // options["num_shared_experts"]
    own = slice(number * width, (number + 1) * width)
    inner_F = weights["shared_expert.up_proj.weight"][own] @ x_D
    if options["gated"]:
        gate_F = weights["shared_expert.gate_proj.weight"][own] @ x_D
        inner_F = gated_unit(options["activation"], gate_F, inner_F, options["glu"])
    else:
        inner_F = activation(options["activation"], inner_F)
    return weights["shared_expert.down_proj.weight"][:, own] @ inner_F


def _jittered(asking: Sequence[Tensor], router: Options, call: Call) -> Sequence[Tensor]:
    """Multiply what the router reads by random factors (arXiv:2101.03961, section 2.4)."""
    if not (call.training and router["jitter"]) or router["jitter_experts"]:
        return asking
    factors = _jitter(asking, router)
    return [x_D * factor_D for x_D, factor_D in zip(asking, factors, strict=True)]


def _jitter(asking: Sequence[Tensor], router: Options) -> Tensor:
    factors = torch.empty(len(asking), len(asking[0]), dtype=asking[0].dtype)
    return factors.uniform_(1 - router["jitter"], 1 + router["jitter"])


def _mixed(logits: list[Tensor], top_k: int, eps: float, training: bool) -> list[dict[int, Tensor]]:
    """Sample experts one after another, as SparseMixer-v2 does (arXiv:2409.12136).

    The gradient of a weight is that of its share of a softmax, ``p_e (1[e = o] - p_o)``.
    """
    found: list[dict[int, Tensor]] = [{} for _ in logits]
    for _ in range(top_k):
        noise, drawn = torch.zeros(len(logits), len(logits[0])), torch.zeros(len(logits))
        if training:
            noise = torch.empty_like(torch.stack(logits)).exponential_()
            drawn = torch.rand(len(logits), 1, dtype=noise.dtype).flatten()
        for t, logits_E in enumerate(logits):
            values = logits_E.tolist()
            left = [e for e in range(len(values)) if e not in found[t]]
            top = max(values[e] for e in left)
            near = [e for e in left if (top - values[e]) / max(abs(values[e]), top) <= 2 * eps]
            share = dict(zip(near, softmax(torch.stack([logits_E[e] for e in near])), strict=True))
            best_one = near[best(torch.tensor([values[e] for e in near]), 1)[0]]
            chosen, factor = best_one, 1.0
            if training:
                chosen = max(near, key=lambda e, t=t: logits[t][e] - math.log(noise[t, e]))
                factor = 1.0 if chosen == best_one or drawn[t] > 0.75 else 0.3333
            found[t][chosen] = _StraightThrough.apply(share[chosen], factor)
    return found


class _StraightThrough(torch.autograd.Function):
    """Multiplies by a number that the gradient does not see."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        return factor * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


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
    return torch.where(closed, 0.0 if router["closed_groups"] == "zero" else -math.inf, wanted_E)


def _within_capacity(
    weights: Weights,
    options: Options,
    wanted: list[tuple[list[int], dict[int, Tensor]]],
    gates: list[dict[int, Tensor]],
    length: int,
    training: bool,
) -> list[dict[int, Tensor]]:
    """Keep what experts have room for (arXiv:2006.16668, algorithm 1; 2101.03961, eq. 3).

    ``wanted`` has each token's experts, best first, and their raw scores.
    """
    capacity, top_k, experts = options["capacity"], options["top_k"], options["num_experts"]
    factor = Fraction(str(capacity["factor" if training else "eval_factor"]))
    threshold = capacity["second_choice_threshold"] if training else 0.0
    drawn = torch.rand(len(wanted), top_k, dtype=torch.float64) if threshold else None
    after = capacity["normalize"] == "after"
    left: list[dict[int, Tensor]] = [{e: s for e, s in raw.items() if e < 0} for _, raw in wanted]
    size = length if capacity["scope"] == "sequence" else max(len(wanted), 1)
    for first in range(0, len(wanted), size):
        members = list(range(first, min(first + size, len(wanted))))
        if capacity["order"] == "score":  # arXiv:2106.05974, section 4
            members.sort(key=lambda t: -max((wanted[t][1][e] for e in wanted[t][0]), default=0.0))
        tokens = sum(bool(wanted[t][0]) for t in members)
        room = max(capacity["minimum"], math.ceil(factor * top_k * tokens / experts))
        room = min(room if capacity["fixed"] is None else capacity["fixed"], tokens)
        taken = [0] * experts
        for place in range(top_k):  # all first choices before any second
            for t in members:
                mine, raw = wanted[t]
                if place >= len(mine):
                    continue
                e = mine[place]
                kept_by = raw[e] if after else gates[t][e]
                if drawn is not None and place and drawn[t, place] >= kept_by / threshold:
                    continue
                if taken[e] < room:
                    taken[e] += 1
                    left[t][e] = raw[e]
    if after:
        return [_weighed(weights, options["router"], raw) if raw else {} for raw in left]
    return [{e: gates[t][e] for e in raw if e in gates[t]} for t, raw in enumerate(left)]


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
            for e in chosen[t]:
                gate = gates[t][e]
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
    linear = options["router"]["logits"]
    asking = [_router_input(weights, linear, x_D, call, t) for t, x_D in enumerate(asking)]
    logits = [_logits(weights, linear, x_D) for x_D in asking]
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


def _thresholds_choose(
    weights: Weights,
    options: Options,
    hidden: Tensor,
    asking: Sequence[Tensor],
    real: Sequence[bool],
    call: Call,
) -> tuple[list[dict[int, Tensor]], dict[str, Tensor], list[int]]:
    """Let each expert take the tokens whose score is above its threshold (arXiv:2603.11535)."""
    router, clean, gates = options["router"], [], []
    for t, x_D in enumerate(_jittered(asking, router, call)):
        x_D = _router_input(weights, router["logits"], x_D, call, t)
        logits_E = _logits(weights, router["logits"], x_D)
        scores_E = softmax(logits_E) if router["score"] == "softmax" else _score(logits_E, router)
        mine = {}
        for e, limit in enumerate(weights["gate.threshold"].tolist()):
            # Before its first step an expert has the threshold -1, and tokens choose it.
            taken = scores_E[e].item() > limit
            if limit < 0:
                taken = e in best(scores_E, options["top_k"])
            if taken and real[t]:
                mine[e] = scores_E[e] * router["scale"]
        clean.append(logits_E)
        gates.append(mine)
    losses = {}
    if weight := options["balance"]["z_loss"]:
        losses["router_z"] = weight * z_loss([clean[t] for t in range(len(clean)) if real[t]])
    return gates, losses, _count([list(mine) for mine in gates], options["num_experts"])


def _positive_scores_choose(
    weights: Weights,
    options: Options,
    hidden: Tensor,
    asking: Sequence[Tensor],
    real: Sequence[bool],
    call: Call,
) -> tuple[list[dict[int, Tensor]], dict[str, Tensor], list[int]]:
    """Run all experts with a positive logit, which weighs them (arXiv:2412.14711)."""
    router, balance, experts = options["router"], options["balance"], options["num_experts"]
    clean, gates = [], []
    for t, x_D in enumerate(_jittered(asking, router, call)):
        x_D = _router_input(weights, router["logits"], x_D, call, t)
        logits_E = _logits(weights, router["logits"], x_D)
        mine = {e: logits_E[e] for e in range(experts) if logits_E[e] > 0 and real[t]}
        clean.append(logits_E)
        gates.append(mine)
    everyone = [t for t in range(len(clean)) if real[t]]
    counts = _count([list(mine) for mine in gates], experts)
    total = torch.zeros((), dtype=hidden.dtype)
    for mine in gates:
        for e, gate in mine.items():
            total = total + counts[e] * experts / (options["top_k"] * len(everyone)) * gate
    losses = {"sparsity": weights["gate.sparsity_weight"][0] * total / len(everyone)}
    if weight := balance["z_loss"]:
        losses["router_z"] = weight * z_loss([clean[t] for t in everyone])
    scaled = [{e: gate * router["scale"] for e, gate in mine.items()} for mine in gates]
    return scaled, losses, counts


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
        read = asking[t]
        if options["router"] == "shared":
            read = torch.cat([read, *_shared_sizes(weights, options, read)])
        score_E = weights["gate.weight"] @ read
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


def _shared_sizes(weights: Weights, options: Options, x_D: Tensor) -> list[Tensor]:
    """Return how active each neuron of the shared part is, whatever its sign."""
    sizes = []
    for i in range(len(weights["shared_expert.up_proj.weight"])):
        up = (weights["shared_expert.up_proj.weight"][i] * x_D).sum()
        if "shared_expert.up_proj.bias" in weights:
            up = up + weights["shared_expert.up_proj.bias"][i]
        gate = up
        if options["gated"]:
            gate = (weights["shared_expert.gate_proj.weight"][i] * x_D).sum()
            if "shared_expert.gate_proj.bias" in weights:
                gate = gate + weights["shared_expert.gate_proj.bias"][i]
        value = activation(options["activation"], gate)
        value = value * up if options["gated"] else value
        sizes.append(torch.where(value < 0, -value, value).reshape(1))
    return sizes
