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


def l3(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = W_mix [RMSNorm(W_up Σ_i softmax(K n)_i V_i); n]`` (arXiv:2601.21461, section 3.1)."""
    tokens, _, real = tokens_of(hidden, call)
    names = call.token_ids.reshape(-1).tolist()
    values = "keys.weight" if options["d_value"] is None else "values.weight"
    rows, counts = [], [0] * options["num_rows"]
    for x_D, name, is_real in zip(tokens, names, real, strict=True):
        if not is_real:
            rows.append(torch.zeros_like(x_D))
            continue
        begin, end = (int(weights["starts"][name + i]) for i in range(2))
        n_D = _unit(x_D) * weights["norm.weight"]
        share = softmax(torch.stack([weights["keys.weight"][i] @ n_D for i in range(begin, end)]))
        sum_E = torch.zeros_like(weights[values][0])
        for i in range(begin, end):
            counts[i] += 1
            sum_E = sum_E + share[i - begin] * weights[values][i]
        u_U = _unit(weights["up_proj.weight"] @ sum_E) * weights["up_norm.weight"]
        rows.append(weights["mix_proj.weight"] @ torch.cat([u_U, n_D]))
    return Answer(stacked(rows, hidden), {}, counts)


def per_layer_embedding(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = RMSNorm(W_2 (act(W_1 h) * p))``, p of the token's row and its embedding (Gemma 3n)."""
    tokens, _, real = tokens_of(hidden, call)
    names, eps = call.token_ids.reshape(-1).tolist(), options["norm_eps"]
    entering = hidden if call.embeddings is None else call.embeddings
    rows, counts = [], [0] * options["vocab_size"]
    every = zip(tokens, entering.reshape(-1, hidden.shape[-1]), names, real, strict=True)
    for x_D, e_D, name, is_real in every:
        if not is_real:
            rows.append(torch.zeros_like(x_D))
            continue
        counts[name] += 1
        read_P = weights["embedding_proj.weight"] @ e_D / len(e_D) ** 0.5
        read_P = _unit(read_P, eps) * weights["embedding_norm.weight"]
        p_P = (weights["table.weight"][name] * len(read_P) ** 0.5 + read_P) / 2**0.5
        gate_P = activation(options["activation"], weights["gate_proj.weight"] @ x_D)
        y_D = weights["out_proj.weight"] @ (gate_P * p_P)
        rows.append(_unit(y_D, eps) * weights["out_norm.weight"])
    return Answer(stacked(rows, hidden), {}, counts)


def engram(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y = FFN(h) + g W_v e``, e the rows of n-grams (arXiv:2601.07372, sections 2.2 and 2.3)."""
    width = hidden.shape[-1]
    sequences = hidden.reshape(-1, hidden.shape[-2], width) if hidden.ndim > 2 else hidden[None]
    ids = call.token_ids.reshape(sequences.shape[:2]).tolist()
    masks = [[True] * len(row) for row in ids]
    if call.mask is not None:
        masks = call.mask.reshape(sequences.shape[:2]).tolist()
    heads = options["num_heads"] * (options["max_ngram"] - 1)
    sizes = _sizes(options, heads)
    rows, counts = [], [0] * sum(sizes)
    for x_TD, names, real in zip(sequences, ids, masks, strict=True):
        gated: list[Tensor] = []
        for t, x_D in enumerate(x_TD.unbind()):
            if not real[t]:
                rows.append(torch.zeros_like(x_D))
                gated.append(rows[-1])
                continue
            grams = _grams(weights, options, names, real, t)
            read = []
            for j, size in enumerate(sizes):
                row = sum(sizes[:j]) + _mixed(weights, options, grams, j) % size
                counts[row] += 1
                read.append(weights["table.weight"][row])
            e_M = torch.cat(read)
            v_D = weights["value_proj.weight"] @ e_M
            if options["gate"]:
                key_D = _unit(weights["key_proj.weight"] @ e_M) * weights["key_norm.weight"]
                query_D = _unit(x_D) * weights["query_norm.weight"]
                z = (key_D * query_D).sum() / width**0.5
                size = torch.sqrt(torch.where(torch.abs(z) > 1e-6, torch.abs(z), 1e-6))
                v_D = v_D / (1 + torch.exp(-size if z > 0 else size))
            gated.append(v_D)
            if options["convolution"]:
                v_D = v_D + _convolved(weights, options, gated, names, real)
            if options["d_ff"]:
                block = {"activation": "silu", "gated": True}
                v_D = v_D + dense_block(weights, "ffn.", block, x_D)
            rows.append(v_D)
    return Answer(stacked(rows, hidden), {}, counts)


def _convolved(
    weights: Weights, options: Options, gated: list[Tensor], names: list[int], real: list[bool]
) -> Tensor:
    """Return ``SiLU(Σ_j w_j * RMSNorm(v_{t - j n}))`` for the last token of those so far."""
    t, total = len(gated) - 1, torch.zeros_like(gated[0])
    for j in range(4):
        s = t - j * options["max_ngram"]
        between = range(max(s, 0), t)  # a document ends with its boundary, or at padding
        if s < 0 or any(not real[i] or names[i] == options["boundary_id"] for i in between):
            break
        u_D = _unit(gated[s]) * weights["conv.norm.weight"]
        total = total + weights["conv.weight"][j] * u_D
    return total / (1 + torch.exp(-total))


def _unit(x_D: Tensor, eps: float = 1e-6) -> Tensor:
    return x_D / torch.sqrt((x_D**2).sum() / len(x_D) + eps)


def _sizes(options: Options, heads: int) -> list[int]:
    """List the rows of each hash function: primes, or odd numbers above an even one."""
    before, first = (options["index"] or 0) * heads, options["num_rows"]
    if options["hash_function"] == "polynomial":
        return [first + 1 + 2 * (before + j) for j in range(heads)]
    primes = [n for n in range(first, 20 * first) if all(n % d for d in range(2, n))]
    return primes[before : before + heads]


def _grams(
    weights: Weights, options: Options, names: list[int], real: list[bool], t: int
) -> list[int]:
    """Return the classes of a token and of those before it, up to where its document begins."""
    found, inside = [], True
    for i in range(options["max_ngram"]):
        if i:
            inside = inside and t >= i and real[t - i] and names[t - i] != options["boundary_id"]
        found.append(int(weights["hash.compressed"][names[t - i] if inside else -1]))
    return found


def _mixed(weights: Weights, options: Options, grams: list[int], head: int) -> int:
    order, mixed = 2 + head // options["num_heads"], 0
    for i in range(order):
        if options["hash_function"] == "polynomial":
            mixed += grams[i] * options["vocab_size"] ** i
        else:
            mixed ^= grams[i] * int(weights["hash.multipliers"][i])
    return mixed
