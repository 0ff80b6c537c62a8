"""Hash layers: a table says who is asked (arXiv:2106.04426, section 3)."""

from __future__ import annotations

import torch
from plain.parts import Answer, Call, Experts, Options, Weights, sigmoid, softmax, stacked
from torch import Tensor


def hash_layer(weights: Weights, options: Options, hidden: Tensor, call: Call) -> Answer:
    """``y_t = Σ_r C^r_{hash_r(t)} act(B^r_{hash_r(t)} h_t)``, segment r of each expert.

    What lies before a sequence, behind it or in its padding counts as the token ``vocab_size``.
    """
    width = hidden.shape[-1]
    experts, hashes = options["num_experts"], options["num_hashes"]
    sequences = hidden.reshape(-1, hidden.shape[-2], width)
    ids = call.token_ids.reshape(sequences.shape[:2]).tolist()
    masks = [[True] * len(row) for row in ids]
    if call.mask is not None:
        masks = call.mask.reshape(sequences.shape[:2]).tolist()
    answer = Experts(weights, "experts.", options)
    rows, counts = [], [0] * experts
    for x_TD, names, real in zip(sequences, ids, masks, strict=True):

        def name(t: int, names: list[int] = names, real: list[bool] = real) -> int:
            return names[t] if 0 <= t < len(names) and real[t] else options["vocab_size"]

        for t, x_D in enumerate(x_TD.unbind()):
            y_D = torch.zeros_like(x_D)
            if not real[t]:
                rows.append(y_D)
                continue
            score = _gate(weights, options, x_D)
            chosen = [
                _hash(weights["table"], options, name, t, r, sum(real[:t]))
                for r in range(hashes * options["top_k"])
            ]
            for r, e in enumerate(chosen):
                counts[e] += 1
                y_eD = answer(e * hashes + r % hashes, x_D)
                if score is not None:
                    total = sum(score[other] for other in chosen)
                    y_eD = options["scale"] * score[e] / total * y_eD
                y_D = y_D + y_eD
            if options["compat"] == "parlai":
                y_D = _layer_norm(x_D + y_D) * weights["norm.weight"] + weights["norm.bias"]
            rows.append(y_D)
    return Answer(stacked(rows, hidden), {}, counts)


def _hash(table: Tensor, options: Options, name, t: int, r: int, position: int) -> int:
    """Return the expert that hash r finds for token t, the ``position``-th real one."""
    key = options["key"]
    if key == "position":
        return position % options["num_experts"]
    if key == "bigram":
        of_previous, of_token = table[r, name(t - 1)], table[options["num_hashes"] + r, name(t)]
        return int(of_previous + of_token) % options["num_experts"]
    return int(table[r, name(t + {"token": 0, "previous": -1, "future": 1}[key])])


def _gate(weights: Weights, options: Options, x_D: Tensor) -> Tensor | None:
    """Return the experts' scores (arXiv:2606.19348, section 2.1); None where none are learned."""
    if options["weights"] == "one":
        return None
    logit_E = weights["gate.weight"] @ x_D
    if options["score"] == "softmax":
        return softmax(logit_E)
    if options["score"] == "sigmoid":
        return sigmoid(logit_E)
    return torch.sqrt(torch.log(1 + torch.exp(logit_E)))


def _layer_norm(x_D: Tensor) -> Tensor:
    centred_D = x_D - x_D.sum() / len(x_D)
    return centred_D / torch.sqrt((centred_D**2).sum() / len(x_D) + 1e-5)
