"""Which neurons a token needs, and how many of them a choice finds.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.errors import InputError, check_choice, check_number
from moezoo_kernels.linear import linear

LabelRule = Literal["positive", "strongest"]
_TOKENS = 1024


def contributions(hidden_TF: Tensor, down_DF: Tensor) -> Tensor:
    """Return the length of every neuron's part of the output, ``|h_j| ||W_down[:, j]||``.

    Args:
        hidden_TF: the hidden activations h.
        down_DF: the output projection.

    Returns:
        ``(T, F)``, in the dtype of ``hidden_TF``.
    """
    return hidden_TF.abs() * down_DF.norm(dim=0).to(hidden_TF.dtype)


def strongest(scores_TF: Tensor, count: int) -> Tensor:
    """Mark each token's ``count`` highest scores, the lower index among equals, ``(T, F)`` bool."""
    marks_TF = torch.zeros_like(scores_TF, dtype=torch.bool)
    for scores, marks in zip(scores_TF.split(_TOKENS), marks_TF.split(_TOKENS), strict=True):
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        marks.scatter_(1, best, True)
    return marks_TF


def label(block: Block, x_TD: Tensor, rule: LabelRule, share: float | None = None) -> Tensor:
    """Mark the neurons that each token needs.

    ``positive``: those whose activation function reads more than zero (Deja Vu, Liu et al. 2023,
    arXiv:2310.17157, section 4.1), which are those that ReLU leaves. SiLU and GELU leave nearly all
    as numbers other than zero, so that this rule says nothing of what they need; it is refused
    unless the activation is zero below zero. ``strongest``: the share of neurons whose part of the
    output is longest.

    Args:
        block: the dense block.
        x_TD: its inputs.
        rule: which of the two.
        share: of the neurons, for ``strongest``; not given for ``positive``.

    Returns:
        ``(T, F)`` bool.

    Raises:
        InputError: the rule does not fit the activation, or the share is missing, too many or out
            of range.
    """
    check_choice("labels", rule, ("positive", "strongest"))
    if rule == "strongest":
        if share is None:
            raise InputError("share: 'strongest' labels a share of the neurons; give it")
        if not check_number("share", share, maximum=1.0):
            raise InputError("share: 0 labels no neuron; give more")
        count = max(round(share * block.width), 1)
        return torch.cat(
            [
                strongest(contributions(block.hidden(x), block.down), count)
                for x in x_TD.split(_TOKENS)
            ]
        )
    if share is not None:
        raise InputError("share: positive pre-activations are counted, not chosen; leave it out")
    below = torch.linspace(-8.0, 0.0, 65, dtype=x_TD.dtype, device=x_TD.device)
    if bool(block.act(below).any()):
        raise InputError(
            "labels: 'positive' fits ReLU and its square; this activation is not zero below zero; "
            "use strongest"
        )
    rows_FD, bias = (block.up, block.bias_in) if block.gate is None else (block.gate, None)
    return torch.cat([linear(x, rows_FD, bias) > 0 for x in x_TD.split(_TOKENS)])


def recall_at(scores_TF: Tensor, labels_TF: Tensor, count: int) -> float:
    """Return the share of labelled neurons among each token's ``count`` highest scores.

    At an equal budget it cannot be raised by calling more neurons needed, as the recall of a
    probability of one half can.

    Args:
        scores_TF: of a selector.
        labels_TF: bool, the neurons that are needed.
        count: neurons that are chosen, the lower index among equals.
    """
    found = (strongest(scores_TF, count) & labels_TF).sum()
    return float(found / labels_TF.sum().clamp(min=1))


def energy_at(scores_TF: Tensor, parts_TF: Tensor, count: int) -> float:
    """Return how much of the squared lengths of neurons' parts the ``count`` best scores keep.

    Recall counts all needed neurons alike; where a few carry most of the output, this tells more.

    Args:
        scores_TF: of a selector.
        parts_TF: of :func:`contributions`.
        count: neurons that are chosen.
    """
    squares_TF = parts_TF.square()
    kept = squares_TF[strongest(scores_TF, count)].sum(dtype=torch.float64)
    return float(kept / squares_TF.sum(dtype=torch.float64).clamp(min=1e-30))


def smallest_count(scores_TF: Tensor, labels_TF: Tensor, recall: float, multiple: int = 1) -> int:
    """Return the fewest neurons by which a selector reaches a recall (Polar Sparsity's k).

    Shrestha et al. 2025, arXiv:2505.14884: each layer has the smallest k whose recall on
    calibration tokens is .99, rounded up to a multiple of 128.

    Args:
        scores_TF: of a selector.
        labels_TF: bool, the neurons that are needed.
        recall: to reach, in (0, 1].
        multiple: what the answer is rounded up to; all neurons are the most.

    Raises:
        InputError: ``recall`` is out of range.
    """
    if not check_number("recall", recall, maximum=1.0):
        raise InputError("recall: 0 needs no neuron; give more")
    width = scores_TF.shape[1]
    found_F = torch.zeros(width, dtype=torch.int64, device=scores_TF.device)
    for scores, labels in zip(scores_TF.split(_TOKENS), labels_TF.split(_TOKENS), strict=True):
        order = scores.sort(dim=1, descending=True, stable=True).indices
        found_F += labels.gather(1, order).sum(dim=0)
    reached_F = found_F.cumsum(0)
    needed = recall * float(reached_F[-1])
    count = int((reached_F.double() < needed - 1e-9).sum()) + 1
    return min(-(-count // multiple) * multiple, width)
