"""Expert capacity: which tokens are kept when an expert has more than it has room for."""

from __future__ import annotations

from fractions import Fraction
from typing import cast

import torch
from torch import Tensor

from moezoo.routing.options import CapacityOptions
from moezoo.routing.stats import count_tokens

_MOST_TOKENS = 1 << 31
"""Counts of tokens below it are exact: numerator and denominator leave room for them in int64."""


def expert_capacity(
    tokens: Tensor | int, num_experts: int, top_k: int, factor: float, minimum: int
) -> Tensor | int:
    """Compute ``min(tokens, max(minimum, ceil(factor * top_k * tokens / num_experts)))``.

    In whole numbers, on every device: ``factor`` is the decimal that was written, so that 1.1 of
    50 is 55, which no binary fraction near 1.1 gives. An expert is asked at most once by a token,
    so that it never needs room for more than there are.

    Args:
        tokens: how many are real, below 2^31; may be an int64 tensor, so that no device has to
            wait.
        num_experts: number of experts.
        top_k: experts per token.
        factor: capacity factor, finite.
        minimum: least capacity, unless there are fewer tokens.
    """
    return capacity_of(tokens, exact_share(factor, top_k, num_experts), minimum)


def capacity_of(tokens: Tensor | int, share: tuple[int, int], minimum: int) -> Tensor | int:
    """Compute the capacity of :func:`expert_capacity` from what :func:`exact_share` returned."""
    numerator, denominator = share
    room = -(-tokens * numerator // denominator)
    if isinstance(room, Tensor):
        return room.clamp(min=minimum).minimum(torch.as_tensor(tokens))
    return min(tokens, max(minimum, room))


def exact_share(factor: float, top_k: int, num_experts: int) -> tuple[int, int]:
    """Return numerator and denominator of ``factor * top_k / num_experts``, or 1 if that is less.

    A fraction of more digits than int64 has room for is replaced by the next one that gives the
    same capacity for every number of tokens below 2^31.
    """
    share = min(Fraction(str(factor)) * top_k / num_experts, Fraction(1))
    nearest = share.limit_denominator(_MOST_TOKENS)
    if nearest < share:
        # The next fraction above with such a denominator. No m / n with n tokens lies between it
        # and the share, so that both have the same ceiling.
        p, q = nearest.numerator, nearest.denominator
        denominator = _MOST_TOKENS - (_MOST_TOKENS + pow(p, -1, q)) % q if q > 1 else _MOST_TOKENS
        nearest = Fraction((p * denominator + 1) // q, denominator)
    return nearest.numerator, nearest.denominator


def within_capacity(indices_TK: Tensor, num_experts: int, capacity: Tensor | int) -> Tensor:
    """Return which assignments an expert has room for.

    First choices of all tokens come before second choices, and among equals the earlier position
    comes first (arXiv:2006.16668, algorithm 1).

    Args:
        indices_TK: chosen experts, best first; -1 for none.
        num_experts: number of experts E.
        capacity: assignments one expert takes.

    Returns:
        ``(T, K)`` bool; false at -1.
    """
    experts = indices_TK.t().reshape(-1)
    order = experts.argsort(stable=True)
    arranged = experts[order]
    position = torch.arange(experts.numel(), device=experts.device)
    # searchsorted finds where each expert's run starts, so the difference is a place in the queue.
    start = torch.searchsorted(arranged, torch.arange(num_experts, device=experts.device))
    place = position - start[arranged.clamp(min=0)]
    served = torch.zeros_like(experts, dtype=torch.bool)
    served[order] = (place < capacity) & (arranged >= 0)
    return served.reshape(indices_TK.shape[1], indices_TK.shape[0]).t()


def limit(
    indices_TK: Tensor,
    weights_TK: Tensor,
    mask_T: Tensor | None,
    num_experts: int,
    share: tuple[int, int],
    options: CapacityOptions,
    second_choice_threshold: float,
) -> tuple[Tensor, Tensor, int]:
    """Drop the assignments that experts have no room for.

    Args:
        indices_TK: chosen experts, best first; -1 for none.
        weights_TK: their weights.
        mask_T: true at real tokens.
        num_experts: number of experts E.
        share: of the tokens, what :func:`exact_share` returned.
        options: of the layer.
        second_choice_threshold: that of the options, 0 outside training.

    Returns:
        The indices, -1 where dropped; how many were dropped; and an upper bound on those left.
    """
    tokens, top_k = indices_TK.shape
    if second_choice_threshold:
        keep = weights_TK.detach() / second_choice_threshold
        keep[:, 0] = 1.0
        indices_TK = indices_TK.masked_fill(torch.rand_like(keep) >= keep, -1)
    capacity = capacity_of(count_tokens(indices_TK, mask_T), share, options.minimum)
    served = within_capacity(indices_TK, num_experts, capacity)
    dropped = ((indices_TK >= 0) & ~served).sum()
    # Exact numbers grow with the count of tokens, padding included: this one is never too low.
    bound = num_experts * cast("int", capacity_of(tokens, share, options.minimum))
    return indices_TK.masked_fill(~served, -1), dropped, min(tokens * top_k, bound)
