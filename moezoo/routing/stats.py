"""Statistics of routing: the balance of the load, the entropy of the router.

All take real tokens only and give detached tensors, in fp32, or in fp64 if that is what they get.
What a router chooses among (experts, leaves, values, neurons) are its N *slots*.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels.flops import has_data
from moezoo_kernels.row_sums import sort_by_row

MOST_COUNTS = 4096
"""Layers with more slots than this return no counts with every step, only their summary."""
_STATISTICS_BLOCK = 1024  # tokens
_MANY_SLOTS = 4  # times the choices: then most slots are chosen by none
_UNIT = 2.0**-32
"""Integers add up to the same total in any order, floats do not: weights are counted in these."""


class SlotLoad(NamedTuple):
    """The load of each of N slots in one forward pass, summed over its real tokens.

    Attributes:
        counts: ``(N,)`` int64, how often each was chosen.
        mass: ``(N,)`` fp32 or fp64, the total gate weight of each: after the softmax, and before
            any limit on capacity.
        best: ``(N,)`` int64, how often each was the first choice; None where there is no first.
        kind: what the slots are, in the plural: experts, leaves, values, neurons.
        shape: how they are laid out; ``(n, n)`` for product keys, else ``(N,)``.
    """

    counts: Tensor
    mass: Tensor
    best: Tensor | None
    kind: str
    shape: tuple[int, ...]


def expert_counts(indices: Tensor, num_experts: int) -> Tensor:
    """Count assignments per expert, ``(E,)`` int64; index -1 (no expert) is not counted."""
    slots = indices.reshape(-1) + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:]


def count_tokens(indices: Tensor, mask_T: Tensor | None) -> Tensor:
    """Count the real tokens that chose, a scalar int64."""
    return torch.tensor(len(indices), device=indices.device) if mask_T is None else mask_T.sum()


def max_violation(counts_E: Tensor) -> Tensor:
    """Return MaxVio, ``max load / mean load - 1``: 0 when even (arXiv:2408.15664, eq. 4)."""
    counts_E = _at_least_fp32(counts_E)
    return counts_E.max() / counts_E.mean().clamp(min=1e-9) - 1


def load_entropy(counts_E: Tensor) -> Tensor:
    """Return the normalized entropy of the load, over log E: 1 when even, 0 if one has all."""
    share = _at_least_fp32(counts_E) / counts_E.sum().clamp(min=1)
    entropy = torch.special.entr(share).sum()
    return entropy / max(math.log(counts_E.numel()), 1e-9)


def mean_entropy(probabilities_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Average the entropy, in nats, of each token's distribution over experts."""
    entropy = torch.special.entr(probabilities_TE.detach().float()).sum(dim=-1)
    if mask_T is None:
        return entropy.sum() / max(entropy.numel(), 1)
    return (entropy * mask_T).sum() / mask_T.sum().clamp(min=1)


def slot_weight(
    indices: Tensor, weights: Tensor | None, num_slots: int, mask_T: Tensor | None = None
) -> Tensor:
    """Sum each slot's weights over the real tokens, ``(N,)``; without weights, count.

    Weights are those after the softmax (arXiv:1907.05242, section 4.4): before it they may cancel.

    Args:
        indices: ``(T, …)`` slots, -1 for none.
        weights: non-negative, shaped as the indices.
        num_slots: number of slots N.
        mask_T: true at real tokens.

    Returns:
        ``(N,)`` fp32, fp64 for fp64 weights.
    """
    unit = 1.0 if weights is None else _UNIT
    amounts = torch.ones_like(indices)
    dtype = torch.float32
    if weights is not None:
        wide = _at_least_fp32(weights.detach())
        dtype = wide.dtype
        amounts = (wide / unit).round().to(torch.int64)  # dividing by a power of two is exact
    kept = indices >= 0
    if mask_T is not None:
        kept = kept & mask_T.reshape(-1, *(1,) * (indices.ndim - 1))
    total = torch.zeros(num_slots, dtype=torch.int64, device=indices.device)
    slots = indices.clamp(min=0).reshape(-1)
    total.scatter_add_(0, slots, amounts.masked_fill(~kept, 0).reshape(-1))
    return total.to(dtype) * unit


def used_weight(
    indices: Tensor, weights: Tensor | None, num_slots: int, mask_T: Tensor | None = None
) -> Tensor:
    """Return what :func:`slot_weight` does, on a CPU without the slots that nothing chose.

    Those are left out where they are most: a table of a gigabyte costs no more than the rows of it
    that are read.
    """
    few = indices.device.type == "cpu" and num_slots > _MANY_SLOTS * indices.numel()
    if not few or torch.compiler.is_compiling() or not has_data(indices):
        return slot_weight(indices, weights, num_slots, mask_T)
    if mask_T is not None:
        indices = indices.masked_fill(~mask_T.reshape(-1, *(1,) * (indices.ndim - 1)), -1)
    order, starts, _ = sort_by_row(indices.reshape(-1, 1), num_slots, only_used=True)
    if weights is None:
        return torch.diff(starts).to(torch.float32)
    wide = _at_least_fp32(weights.detach())
    amounts = (wide / _UNIT).round().to(torch.int64).reshape(-1)[order]
    total = torch.cat([amounts.new_zeros(1), amounts.cumsum(0)])[starts]
    return torch.diff(total).to(wide.dtype) * _UNIT


def slot_load(
    indices: Tensor,
    weights: Tensor | None,
    num_slots: int,
    mask_T: Tensor | None = None,
    *,
    kind: str = "experts",
    shape: tuple[int, ...] | None = None,
    ranked: bool = False,
) -> SlotLoad:
    """Sum up the choices and weights of each slot, for analysis: all N, however many they are.

    Args:
        indices: ``(T, …)`` slots, -1 for none.
        weights: non-negative, shaped as the indices; without them every choice weighs 1.
        num_slots: number of slots N.
        mask_T: true at real tokens.
        kind: what the slots are.
        shape: how they are laid out; default ``(N,)``.
        ranked: whether the last dimension of the indices goes from the best choice to the worst.
    """
    if mask_T is not None:
        indices = indices.masked_fill(~mask_T.reshape(-1, *(1,) * (indices.ndim - 1)), -1)
    return SlotLoad(
        expert_counts(indices, num_slots),
        slot_weight(indices, weights, num_slots),
        expert_counts(indices[..., :1], num_slots) if ranked else None,
        kind,
        shape or (num_slots,),
    )


def slot_stats(
    indices: Tensor,
    weights: Tensor | None,
    num_slots: int,
    mask_T: Tensor | None = None,
    most_counts: int = MOST_COUNTS,
) -> dict[str, Tensor]:
    """Summarise the load of the slots, cheaply enough for every step: nothing is sorted.

    Args:
        indices: as for :func:`slot_load`, as are weights, number of slots and mask.
        weights: as there.
        num_slots: as there.
        mask_T: as there.
        most_counts: return the counts of up to so many slots.

    Returns:
        ``tokens``; ``usage``, the share of slots with any weight; ``unevenness``, the divergence
        of the slots' weights from uniform in nats; and, unless there are too many slots,
        ``expert_counts`` ``(N,)``.
    """
    if mask_T is not None:
        indices = indices.masked_fill(~mask_T.reshape(-1, *(1,) * (indices.ndim - 1)), -1)
    weight_R = used_weight(indices, weights, num_slots)
    stats = {
        "tokens": count_tokens(indices, mask_T),
        "usage": usage(weight_R, num_slots),
        "unevenness": kl_to_uniform(weight_R, num_slots),
    }
    if num_slots <= most_counts:
        stats["expert_counts"] = expert_counts(indices, num_slots)
    return stats


def usage(weight_N: Tensor, num_slots: int | None = None) -> Tensor:
    """Return the fraction of slots with any weight.

    Args:
        weight_N: of the slots.
        num_slots: where some of no weight may be left out, the number of all.
    """
    weight_N = _at_least_fp32(weight_N)
    return (weight_N > 0).to(weight_N.dtype).sum() / (num_slots or weight_N.numel())


def kl_to_uniform(weight_N: Tensor, num_slots: int | None = None) -> Tensor:
    """Return ``KL(share || uniform)`` in nats: 0 when even, log N when one slot has it all.

    Args:
        weight_N: of the slots.
        num_slots: where some of no weight may be left out, the number of all.
    """
    share_N = _at_least_fp32(weight_N) / weight_N.sum().clamp(min=1e-30)
    divergence = torch.special.xlogy(share_N, share_N * (num_slots or share_N.numel())).sum()
    return divergence.clamp(min=0.0)


def gini(weight_N: Tensor) -> Tensor:
    """Return the Gini coefficient: 0 when even, 1 - 1/N when one slot has it all."""
    sorted_N = _at_least_fp32(weight_N).sort().values
    n = sorted_N.numel()
    rank_N = torch.arange(1, n + 1, device=weight_N.device, dtype=sorted_N.dtype)
    weighted = ((2 * rank_N - n - 1) * sorted_N).sum()
    return weighted / (n * sorted_N.sum()).clamp(min=1e-30)


def slots_holding(weight_N: Tensor, fraction: float) -> Tensor:
    """Count the fewest slots that together hold a fraction of the total weight."""
    held_N = weight_N.double().sort(descending=True).values.cumsum(0)
    # A hair less, so that rounding in the sum does not ask for one slot more.
    return (held_N < held_N[-1] * (fraction - 1e-12)).sum() + (held_N[-1] > 0)


def slot_usage(weight_N: Tensor) -> dict[str, Tensor]:
    """Summarise the load of N slots; sorts them, so not meant for every step.

    Args:
        weight_N: what :func:`slot_weight` returned, possibly summed over batches.

    Returns:
        ``usage``, ``unevenness``, ``gini``, and ``top50``, ``top90``, ``top99``: how many slots
        hold that percentage of the total weight.
    """
    summary = {
        "usage": usage(weight_N),
        "unevenness": kl_to_uniform(weight_N),
        "gini": gini(weight_N),
    }
    return summary | {f"top{p}": slots_holding(weight_N, p / 100) for p in (50, 90, 99)}


def _at_least_fp32(x: Tensor) -> Tensor:
    """Promote integers, bf16 and fp16 to fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def neuron_load(inner_TF: Tensor, mask_T: Tensor | None) -> tuple[SlotLoad, Tensor]:
    """Return the neurons' load, and how many each token has that are not zero, ``(T,)``.

    A block of tokens at a time, as what is compared and counted would not fit into a cache.
    """
    wide = torch.promote_types(inner_TF.dtype, torch.float32)
    mass_F = inner_TF.new_zeros(inner_TF.shape[-1], dtype=wide)
    counts_F = inner_TF.new_zeros(inner_TF.shape[-1], dtype=torch.int64)
    active = []
    for i, block_TF in enumerate(inner_TF.split(_STATISTICS_BLOCK)):
        if mask_T is not None:
            mask = mask_T[i * _STATISTICS_BLOCK :][: len(block_TF)]
            block_TF = block_TF.masked_fill(~mask.unsqueeze(-1), 0.0)
        mass_F += block_TF.abs().sum(dim=0, dtype=wide)
        is_active_TF = block_TF != 0
        counts_F += is_active_TF.sum(dim=0)
        active.append(is_active_TF.sum(dim=-1))
    return SlotLoad(counts_F, mass_F, None, "neurons", (inner_TF.shape[-1],)), torch.cat(active)
