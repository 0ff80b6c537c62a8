"""Which rows belong to which expert: the index metadata that every fused backend shares.

An *assignment* is one (token, choice) pair with an expert; its *slot* is ``token * K + choice``.
Assignments are put in expert order, and within an expert in slot order, so that results do not
depend on how a sort breaks ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo_kernels.row_sums import sort_by_row


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
    """Sort the assignments of ``indices`` by expert.

    Args:
        indices: ``(T, K)`` int64 expert numbers, -1 for none.
        num_experts: E.
        rows: N, at least the number of indices that are not -1. It fixes the shapes without
            waiting for a device to count.

    Raises:
        ValueError: an index is not in -1 … E-1, or more than ``rows`` are not -1. On an
            accelerator, where looking would mean waiting, the device asserts it instead.
    """
    sort = _sort_on_cpu if indices.device.type == "cpu" else _sort_on_device
    order, ends = sort(indices.reshape(-1), num_experts, rows)
    return Assignments(order, ends, indices.shape[1])


def check(indices: Tensor, num_experts: int, rows: int) -> None:
    """Check the range of indices on a CPU, where that is free.

    Raises:
        ValueError: one is not in -1 … E-1, or more than ``rows`` are not -1.
    """
    if indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < -1 or most >= num_experts:
        wrong = least if least < -1 else most
        raise ValueError(f"indices: {wrong} is not an expert; give -1 (none) … {num_experts - 1}")
    if rows < indices.numel() and rows < (active := int(indices.ge(0).sum())):
        raise ValueError(
            f"max_assignments: {rows} is less than the {active} indices that are not -1"
        )


def _sort_on_cpu(flat: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    check(flat, num_experts, rows)
    order, starts, _ = sort_by_row(flat, num_experts, only_used=False)
    return order[:rows].clone(), starts[1:].clone()


def _sort_on_device(flat: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort all slots with the -1 last, so that no shape depends on a value."""
    if flat.numel():
        in_range = (flat.min() >= -1) & (flat.max() < num_experts)
        torch._assert_async(in_range, "indices: give expert numbers, or -1 for none")
        enough = flat.ge(0).sum() <= rows
        torch._assert_async(enough, "max_assignments: less than the indices that are not -1")
    keys, order = torch.sort(torch.where(flat < 0, num_experts, flat), stable=True)
    experts = torch.arange(num_experts, device=flat.device)
    return order[:rows].clone(), torch.searchsorted(keys, experts, right=True)
