"""Expert capacity: which tokens are kept when an expert has more than it has room for."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, overload

import torch
from torch import Tensor

from moezoo.routing.balance_options import CapacityOptions
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
        capacity: assignments that each expert takes, one number or ``(E,)``.

    Returns:
        ``(T, K)`` bool; false at -1.
    """
    experts = indices_TK.t().reshape(-1)
    order = experts.argsort(stable=True)
    arranged = experts[order]
    position = torch.arange(experts.numel(), device=experts.device)
    # searchsorted finds where each expert's run starts, so the difference is a place in the queue.
    start = torch.searchsorted(arranged, torch.arange(num_experts, device=experts.device))
    expert = arranged.clamp(min=0)
    if isinstance(capacity, Tensor) and capacity.ndim:
        capacity = capacity[expert]
    served = torch.zeros_like(experts, dtype=torch.bool)
    served[order] = (position - start[expert] < capacity) & (arranged >= 0)
    return served.reshape(indices_TK.shape[1], indices_TK.shape[0]).t()


class Asked(NamedTuple):
    """The assignments that tokens ask for.

    Attributes:
        indices: ``(T, K)`` chosen experts, best first; -1 for none.
        weights: ``(T, K)``, by which second choices are kept at random.
        scores: ``(T, K)``, whose largest says which token is served first.
        mask: ``(T,)``, true at real tokens.
        sequences: how many sequences of what length the tokens are.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    mask: Tensor | None
    sequences: tuple[int, int]


def limit(
    asked: Asked,
    num_experts: int,
    share: tuple[int, int],
    options: CapacityOptions,
    second_choice_threshold: float,
) -> tuple[Tensor, Tensor, int]:
    """Drop the assignments that experts have no room for.

    Args:
        asked: what tokens ask for.
        num_experts: number of experts E.
        share: of the tokens, what :func:`exact_share` returned.
        options: of the layer.
        second_choice_threshold: that of the options, 0 outside training.

    Returns:
        The indices, -1 where dropped; how many were dropped; and an upper bound on those left.
    """
    indices_TK, tokens = asked.indices, len(asked.indices)
    if second_choice_threshold:
        keep = asked.weights.detach() / second_choice_threshold
        keep[:, 0] = 1.0
        indices_TK = indices_TK.masked_fill(torch.rand_like(keep) >= keep, -1)
    queues_TK, queues = indices_TK, num_experts
    if options.scope == "sequence":
        # Each expert has a queue per sequence.
        parts, tokens = asked.sequences
        queues = parts * num_experts
        part_T = torch.arange(parts, device=indices_TK.device).repeat_interleave(tokens)
        queues_TK = indices_TK + num_experts * part_T.unsqueeze(-1)
        queues_TK = queues_TK.masked_fill(indices_TK < 0, -1)
        room = _room(_tokens_of_each(asked), share, options).repeat_interleave(num_experts)
    else:
        room = _room(count_tokens(indices_TK, asked.mask), share, options)
    if options.order == "score":
        first_T = asked.scores.detach().amax(dim=-1).argsort(descending=True, stable=True)
        served = torch.zeros_like(queues_TK, dtype=torch.bool)
        served[first_T] = within_capacity(queues_TK[first_T], queues, room)
    else:
        served = within_capacity(queues_TK, queues, room)
    dropped = ((indices_TK >= 0) & ~served).sum()
    # Exact numbers grow with the count of tokens, padding included: this one is never too low.
    bound = queues * _room(tokens, share, options)
    return indices_TK.masked_fill(~served, -1), dropped, min(indices_TK.numel(), bound)


def _tokens_of_each(asked: Asked) -> Tensor:
    """Count the real tokens of each sequence."""
    parts, length = asked.sequences
    if asked.mask is None:
        return torch.full((parts,), length, device=asked.indices.device)
    return asked.mask.reshape(parts, length).sum(dim=1)


@overload
def _room(tokens: Tensor, share: tuple[int, int], options: CapacityOptions) -> Tensor: ...


@overload
def _room(tokens: int, share: tuple[int, int], options: CapacityOptions) -> int: ...


def _room(tokens: Tensor | int, share: tuple[int, int], options: CapacityOptions) -> Tensor | int:
    if options.fixed is None:
        return capacity_of(tokens, share, options.minimum)
    fixed = options.fixed
    return tokens.clamp(max=fixed) if isinstance(tokens, Tensor) else min(tokens, fixed)
