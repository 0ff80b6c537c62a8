"""Experts with a function between their two products, and perhaps another after the second.

What the fused op of :mod:`moezoo_kernels.grouped_mlp` does not know, their owner says by functions
of rows: an activation, or a norm of each expert's output before it is weighed.

Shapes: T tokens, K choices, E experts, D width, F hidden width, I = 2 F if gated else F, N
assignments in expert order, S = T K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moezoo_kernels import transforms
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.grouped_linear import (
    assign,
    grouped_linear,
    grouped_linear_sum,
    reference,
    sum_by_token,
)
from moezoo_kernels.grouped_linear.by_slot import linear_by_slot, sum_by_slot

OfRows = Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """The stacked weights of experts, as the kernels want them."""

    w_in: Tensor  # (E, I, D)
    w_out: Tensor  # (E, D, F)
    bias_in: Tensor | None  # (E, I)
    bias_out: Tensor | None  # (E, D)


class Choices(NamedTuple):
    """The experts of each token, their weights, and the number of experts E."""

    indices: Tensor  # (T, K), -1 for none
    weights: Tensor  # (T, K)
    num_experts: int


def run_around(
    x: Tensor, weights: Weights, choices: Choices, rows: int, between: OfRows, after: OfRows | None
) -> Tensor:
    """Return the weighted sum of each token's experts, ``(T, D)``.

    Args:
        x: ``(T, D)``.
        weights: of the experts.
        choices: of the tokens.
        rows: N, at least as many as indices are not -1.
        between: from the first products ``(N, I)`` to hidden neurons ``(N, F)``.
        after: from the outputs ``(N, D)`` to what is weighed; None for these themselves. Zero rows
            have to stay finite, and so have their gradients.
    """
    if transforms.is_transformed() and transforms.is_differentiated():
        return _by_the_formula(x, weights, choices, between, after)
    assignments = assign(choices.indices, choices.num_experts, rows)
    inner_NI = grouped_linear(x, weights.w_in, assignments, weights.bias_in)
    hidden_NF = _recomputed(between, inner_NI)
    if hidden_NF.dtype != inner_NI.dtype:
        hidden_NF = hidden_NF.to(inner_NI.dtype)
    if after is None:
        return grouped_linear_sum(
            hidden_NF, weights.w_out, choices.weights, assignments, weights.bias_out
        )
    answer_ND = grouped_linear(
        hidden_NF, weights.w_out, assignments, weights.bias_out, gather=False
    )

    def finish(answer_ND: Tensor, weights_TK: Tensor) -> Tensor:
        return sum_by_token(after(answer_ND), weights_TK, assignments)

    return _recomputed(finish, answer_ND, choices.weights)


def _by_the_formula(
    x: Tensor, weights: Weights, choices: Choices, between: OfRows, after: OfRows | None
) -> Tensor:
    """Do the same by ops of torch, whose derivatives torch takes in any way."""
    w_in, w_out, bias_in, bias_out = (None if t is None else autocast(t) for t in weights)
    assert w_in is not None
    assert w_out is not None
    inner_NI = reference.grouped_linear(autocast(x), w_in, choices.indices, bias_in)
    hidden_NF = between(inner_NI).to(inner_NI.dtype)
    answer_ND = reference.grouped_linear(hidden_NF, w_out, choices.indices, bias_out, gather=False)
    if after is not None:
        answer_ND = after(answer_ND)
    return reference.sum_by_token(answer_ND, choices.weights, choices.indices, choices.num_experts)


def run_slot_by_slot(
    x: Tensor, weights: Weights, choices: Choices, between: OfRows, after: OfRows | None
) -> Tensor:
    """Do what :func:`run_around` does, for a handful of tokens in inference.

    Indices of E or more stand for experts that are not here, as -1 does.
    """
    w_in, w_out, bias_in, bias_out = (None if t is None else autocast(t) for t in weights)
    assert w_in is not None
    assert w_out is not None
    numbers = choices.indices.reshape(-1).tolist()
    inner_SI = linear_by_slot(autocast(x), w_in, numbers, bias_in, choices.indices.shape[1])
    answer_SD = linear_by_slot(between(inner_SI).to(inner_SI.dtype), w_out, numbers, bias_out)
    if after is not None:
        answer_SD = after(answer_SD)
    return sum_by_slot(answer_SD, choices.weights, numbers, choices.num_experts)


def _recomputed(function: Callable[..., Tensor], rows: Tensor, *others: Tensor) -> Tensor:
    """Apply a function of rows, of which the backward keeps only what it was given.

    A compiler decides itself what it keeps.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and rows.requires_grad):
        return function(rows, *others)
    found: Tensor = checkpoint(function, rows, *others, use_reentrant=False)
    return found
