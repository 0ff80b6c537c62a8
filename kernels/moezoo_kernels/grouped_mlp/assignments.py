"""Which rows belong to which expert: the index metadata that every fused backend shares.

An *assignment* is one (token, choice) pair with an expert; its *slot* is ``token * K + choice``.
Assignments are put in expert order, and within an expert in slot order, so that results do not
depend on how a sort breaks ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignments:
    """Assignments in expert order.

    Attributes:
        order: ``(N,)`` int64, the slot of each row. Rows from ``ends[-1]`` on are padding and hold
            any valid slot.
        ends: ``(E,)`` int64, where each expert's rows end.
        choices: K, slots per token.
    """

    order: Tensor
    ends: Tensor
    choices: int

    @property
    def tokens(self) -> Tensor:
        """``(N,)`` int64, the token of each row."""
        return self.order // self.choices


def sort_by_expert(indices: Tensor, num_experts: int, rows: int) -> Assignments:
    """Put the assignments of ``indices`` in expert order.

    Args:
        indices: ``(T, K)`` int64 expert numbers, -1 for none.
        num_experts: E.
        rows: N, at least the number of indices that are not -1. It fixes the shapes without
            waiting for a device to count.

    Raises:
        ValueError: an index is not in -1 … E-1, or more than ``rows`` are not -1. On an
            accelerator, where looking would mean waiting, the device asserts it instead.
    """
    flat = indices.reshape(-1)
    if indices.device.type == "cpu":
        order, keys = _sort_active(flat, num_experts, rows)
    else:
        order, keys = _sort_all(flat, num_experts, rows)
    experts = torch.arange(num_experts, device=flat.device)
    ends = torch.searchsorted(keys, experts, right=True)
    return Assignments(order, ends, indices.shape[1])


def _sort_active(flat: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Drop the -1 first: a sort of N, not of T K, and the values can be looked at for free."""
    slots = flat.ge(0).nonzero().squeeze(-1)
    active = flat[slots]
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= num_experts):
        wrong = int(flat.min()) if int(flat.min()) < -1 else int(flat.max())
        raise ValueError(f"indices: {wrong} is not an expert; give -1 (none) … {num_experts - 1}")
    if active.numel() > rows:
        raise ValueError(
            f"max_assignments: {rows} is less than the {active.numel()} indices that are not -1"
        )
    keys, permutation = torch.sort(active, stable=True)
    order = flat.new_zeros(rows)
    order[: active.numel()] = slots[permutation]
    return order, keys


def _sort_all(flat: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort all slots with the -1 last, so that no shape depends on a value."""
    if flat.numel():
        in_range = (flat.min() >= -1) & (flat.max() < num_experts)
        torch._assert_async(in_range, "indices: give expert numbers, or -1 for none")
        enough = flat.ge(0).sum() <= rows
        torch._assert_async(enough, "max_assignments: less than the indices that are not -1")
    keys, order = torch.sort(torch.where(flat < 0, num_experts, flat), stable=True)
    return order[:rows].clone(), keys
