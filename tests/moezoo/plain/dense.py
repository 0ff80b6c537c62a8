"""Dense blocks (arXiv:1706.03762, eq. 2; arXiv:2002.05202, eq. 6) and all-attention."""

from __future__ import annotations

import math

import torch
from plain.matrices import block_of_matrices
from plain.parts import (
    Answer,
    Call,
    Options,
    Weights,
    activation,
    dense_block,
    dense_hidden,
    sigmoid,
    softmax,
    stacked,
    tokens_of,
)
from torch import Tensor


def dense_ffn(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """Apply the block to every token, padding too.

    A block that trains to be sparse counts the neurons of real tokens that are not zero, and adds
    the coefficient, perhaps of a step of the warm-up, times the mean of their summed magnitudes
    (arXiv:2603.23198).
    """
    if options["matrices"] is not None:
        return block_of_matrices(weights, options, hidden, call)
    tokens, _, real = tokens_of(hidden, call)
    output = stacked([dense_block(weights, "", options, x_D) for x_D in tokens], hidden)
    if not options["l1"] and options["activation_up"] is None:
        return Answer(output, {})
    inner = [dense_hidden(weights, "", options, x_D) for x_D in tokens]
    kept = [h_F for h_F, is_real in zip(inner, real, strict=True) if is_real]
    counts = [sum(bool(h_F[j] != 0) for h_F in kept) for j in range(len(inner[0]))]
    if not options["l1"]:
        return Answer(output, {}, counts)
    share = options["l1"]
    if options["l1_warmup"]:
        share *= min(1.0, (int(weights["l1_step"]) + 1) / options["l1_warmup"])
    size = sum(torch.where(h_F < 0, -h_F, h_F).sum() for h_F in kept)
    return Answer(output, {"l1": share * size / len(kept)}, counts)


def persistent_memory(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """Attend to earlier tokens and to the slots, in one softmax (arXiv:1907.01470, eq. 4-9).

    ``y = W_o Σ_i a_i v_i`` over the context and the slots, ``a = softmax(q · k / sqrt(C))`` with
    keys ``sqrt(C) K_p`` and values ``sqrt(N) V_p`` for the slots.
    """
    width = hidden.shape[-1]
    keys_HNC, values_HNC = weights["slots.keys"], weights["slots.values"]
    heads, slots, head_width = keys_HNC.shape
    sequences = hidden.reshape(-1, hidden.shape[-2], width)
    masks = torch.ones(sequences.shape[:2]) if call.mask is None else call.mask
    masks = masks.reshape(sequences.shape[:2]).bool().tolist()
    rows = []
    for x_TD, real in zip(sequences, masks, strict=True):
        q, k, v = ((weights[f"{n}_proj.weight"] @ x_TD.T).T for n in "qkv")
        for t in range(len(x_TD)):
            last = t + 1 if options["include_self"] else t
            seen = [s for s in range(last) if real[s]]
            joined = []
            for h in range(heads):
                own = slice(h * head_width, (h + 1) * head_width)
                keys = [k[s, own] for s in seen] + [
                    math.sqrt(head_width) * keys_HNC[h, n] for n in range(slots)
                ]
                values = [v[s, own] for s in seen] + [
                    math.sqrt(slots) * values_HNC[h, n] for n in range(slots)
                ]
                scores = torch.stack(keys) @ q[t, own] / math.sqrt(head_width)
                joined.append(softmax(scores) @ torch.stack(values))
            y_D = weights["o_proj.weight"] @ torch.cat(joined)
            rows.append(y_D if real[t] else torch.zeros_like(y_D))
    return Answer(stacked(rows, hidden), {})


def finedeep(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """Pass each token through all experts of each sub-layer (arXiv:2502.12928).

    ``h_m = h_{m-1} + Σ_k σ(w_k · E_k(n)) E_k(n)`` with ``n = RMSNorm(h_{m-1})``, padding
    too. That a vector reads an expert's answer is our reading of the paper.
    """
    tokens, _, _ = tokens_of(hidden, call)
    experts, width = options["num_experts"], options["d_ff"] // options["num_experts"]
    width //= options["num_sublayers"]
    rows = []
    for x_D in tokens:
        h_D = x_D
        for m in range(options["num_sublayers"]):
            name = f"sublayers.{m}."
            rms = torch.sqrt((h_D * h_D).sum() / len(h_D) + options["norm_eps"])
            n_D, added_D = weights[f"{name}norm"] * h_D / rms, torch.zeros_like(h_D)
            for k in range(experts):
                own = slice(k * width, (k + 1) * width)
                inner = {}
                for part in ("gate_proj", "up_proj"):
                    if (matrix := weights.get(f"{name}{part}.weight")) is not None:
                        inner[part] = matrix[own] @ n_D
                        if options["bias"]:
                            inner[part] = inner[part] + weights[f"{name}{part}.bias"][own]
                if options["gated"]:
                    z_F = activation(options["activation"], inner["gate_proj"]) * inner["up_proj"]
                else:
                    z_F = activation(options["activation"], inner["up_proj"])
                answer_D = weights[f"{name}down_proj.weight"][:, own] @ z_F
                if options["bias"]:
                    answer_D = answer_D + weights[f"{name}down_bias"][k]
                weight = sigmoid((weights[f"{name}router"][k] * answer_D).sum())
                added_D = added_D + weight * answer_D
            h_D = h_D + added_D
        rows.append(h_D - x_D)
    return Answer(stacked(rows, hidden), {})
