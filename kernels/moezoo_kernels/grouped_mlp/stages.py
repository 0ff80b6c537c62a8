"""The stages of ``grouped_mlp`` that run on a whole batch at once, and their plain torch form.

Shapes: N rows in expert order, E experts, T tokens, K choices, D width, F hidden width, I = 2 F if
gated else F. Rows from ``ends[-1]`` on are padding: they may hold anything, even NaN, in operands
and results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import PLAIN_GLU, activate, activate_backward
from moezoo_kernels.grouped_matmul import grouped_matmul, grouped_outer
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Unit


class Rows(NamedTuple):
    """N rows: those of ``data``, or the ones among them that ``tokens`` names.

    Attributes:
        data: ``(N, A)``, or ``(T, A)`` if there are tokens.
        tokens: ``(N,)`` int64 or None.
    """

    data: Tensor
    tokens: Tensor | None = None


class HiddenGradients(NamedTuple):
    """Gradients of an expert's activation."""

    weighted: Tensor  # (N, F), the hidden activations times the router weights
    inner: Tensor  # (N, I), gradient of the pre-activations
    weights: Tensor  # (N,), gradient of the router weights


class Stages(NamedTuple):
    """One implementation of the stages.

    Attributes:
        gather: makes rows of tokens; a matrix product may read them where they are.
        matmul: ``(rows, matrices (E, A, B), ends) -> (N, B)``, each group by its own matrix.
        outer: ``(left, right, ends) -> (E, A, B)``, ``left_eᵀ right_e``; zeros for an empty group.
        activate: ``(inner (N, I), unit) -> (N, F)``.
        activate_backward: ``(grad (N, F), inner, weights (N,), unit)``, with ``grad`` that of the
            hidden activations before their router weights.
        sum_by_token: ``(rows (N, D), weights (T, K) or None, assignments, T) -> (T, D)`` in the
            rows' dtype, added up in fp32 at least.
    """

    gather: Callable[[Tensor, Tensor], Rows]
    matmul: Callable[[Rows, Tensor, Tensor], Tensor]
    outer: Callable[[Rows, Rows, Tensor], Tensor]
    activate: Callable[[Tensor, Unit], Tensor]
    activate_backward: Callable[[Tensor, Tensor, Tensor, Unit], HiddenGradients]
    sum_by_token: Callable[[Tensor, Tensor | None, Assignments, int], Tensor]


def is_padding(assignments: Assignments) -> Tensor:
    """Return which rows hold no assignment, ``(N,)``."""
    rows = torch.arange(assignments.order.numel(), device=assignments.order.device)
    return rows >= assignments.ends[-1]


def _activate(inner: Tensor, unit: Unit) -> Tensor:
    return activate(_wide(inner, unit), *unit).to(inner.dtype)


def _activate_backward(grad: Tensor, inner: Tensor, weights: Tensor, unit: Unit) -> HiddenGradients:
    weights_N1, wide = weights[:, None], _wide(inner, unit)
    weighted_grad = (grad * weights_N1).to(wide.dtype)
    hidden, grad_inner = activate_backward(weighted_grad, wide, *unit)
    grad_weights = (grad.to(weights.dtype) * hidden).sum(-1)
    weighted = (hidden * weights_N1).to(inner.dtype)
    return HiddenGradients(weighted, grad_inner.to(inner.dtype), grad_weights)


def _wide(inner: Tensor, unit: Unit) -> Tensor:
    """Return the pre-activations in fp32 for a bounded unit, which has more steps to round in."""
    return inner if unit.glu == PLAIN_GLU or inner.dtype.itemsize > 2 else inner.float()


def _sum_by_token(
    rows_ND: Tensor, weights: Tensor | None, assignments: Assignments, num_tokens: int
) -> Tensor:
    """Sum each token's rows, in the order of its choices; no atomics."""
    accumulation = torch.promote_types(rows_ND.dtype, torch.float32)
    summed_ND = rows_ND.to(accumulation)
    if weights is not None:
        summed_ND = rows_ND * weights.reshape(-1)[assignments.order].to(accumulation)[:, None]
    num_slots = num_tokens * assignments.choices
    slots, by_slot = torch.sort(torch.where(is_padding(assignments), num_slots, assignments.order))
    tokens = torch.arange(num_tokens + 1, device=slots.device)
    starts = torch.searchsorted(slots, tokens * assignments.choices)
    # The last bag holds the padding; dropping it afterwards keeps every shape known beforehand.
    return F.embedding_bag(by_slot, summed_ND, starts, mode="sum")[:-1].to(rows_ND.dtype)


TORCH = Stages(
    gather=lambda source, tokens: Rows(source[tokens]),
    matmul=lambda rows, matrices, ends: grouped_matmul(rows.data, matrices, ends),
    outer=lambda left, right, ends: grouped_outer(left.data, right.data, ends),
    activate=_activate,
    activate_backward=_activate_backward,
    sum_by_token=_sum_by_token,
)
