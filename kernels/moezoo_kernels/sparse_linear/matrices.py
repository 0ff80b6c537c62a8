"""Matrices without their zeros: by blocks, or by groups of which a few count.

Shapes: N outputs, K inputs, S width of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moezoo_kernels import large_pages
from moezoo_kernels.sparse_linear import semi_structured

BLOCKS = (16, 32)
"""The widths of blocks that are known."""

MOST_GROUP = 8
"""The largest M of N:M that is known."""

PANEL = 32
"""Outputs whose weights of one input lie side by side."""


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """A matrix ``(N, K)`` of square blocks, of which those that are zero are left out.

    Attributes:
        values: ``(blocks, S, S)``, inputs first, by rows of blocks.
        columns: ``(blocks,)`` int32, which block of its row each is; increasing in a row.
        starts: ``(N / S + 1,)`` int64, the first block of each row of blocks.
        shape: ``(N, K)``.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @property
    def block(self) -> int:
        """The width S of its blocks."""
        return self.values.shape[1]

    @property
    def density(self) -> float:
        """The share of blocks that are stored."""
        rows, columns = self.shape
        return len(self.values) * self.block**2 / max(1, rows * columns)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels read: values, columns and starts."""
        return self.values, self.columns, self.starts

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What the kernels know it by: its block, and no n and m."""
        return self.block, 0, 0

    def dense(self) -> Tensor:
        """Return the matrix with its zeros, ``(N, K)``."""
        (rows, columns), block = self.shape, self.block
        counts = self.starts.diff()
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        blocks = self.values.new_zeros(rows // block, columns // block, block, block)
        blocks[row, self.columns.long()] = self.values
        return blocks.permute(0, 3, 1, 2).reshape(rows, columns)

    def to(self, dtype: torch.dtype) -> BlockSparse:
        """Return the matrix in another dtype."""
        return self if self.values.dtype == dtype else replace(self, values=self.values.to(dtype))


@dataclass(frozen=True, eq=False)
class GroupSparse:
    """A matrix ``(N, K)`` of which n of every m inputs of an output count.

    Attributes:
        values: ``(panels, K / m n, 32)``, panels of 32 outputs; the last is filled up with zeros.
        places: ``(panels, K / m n, 16)`` uint8, where in their groups the values stand: those of
            outputs i and i + 16 of a panel in the low and the high four bits.
        n: numbers of a group that are stored.
        m: numbers of a group.
        shape: ``(N, K)``.
        semi: the same for NVIDIA's sparse tensor cores, where they can multiply with it.
    """

    values: Tensor
    places: Tensor
    n: int
    m: int
    shape: tuple[int, int]
    semi: Tensor | None = None

    @property
    def density(self) -> float:
        """The share of numbers that are stored."""
        return self.n / self.m

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels read: values, places and no starts."""
        return self.values, self.places, None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What the kernels know it by: no block, n and m."""
        return 0, self.n, self.m

    def dense(self) -> Tensor:
        """Return the matrix with its zeros, ``(N, K)``."""
        rows, columns = self.shape
        places = torch.cat([self.places & 15, self.places >> 4], dim=-1)
        groups = self.values.new_zeros(len(self.values) * PANEL, columns // self.m, self.m)
        by_group = (len(groups), columns // self.m, self.n)
        values = self.values.transpose(1, 2).reshape(by_group)
        groups.scatter_(-1, places.long().transpose(1, 2).reshape(by_group), values)
        return groups.reshape(-1, columns)[:rows].contiguous()

    def to(self, dtype: torch.dtype) -> GroupSparse:
        """Return the matrix in another dtype, without what sparse tensor cores read."""
        if self.values.dtype == dtype:
            return self
        return replace(self, values=self.values.to(dtype), semi=None)


def pack_blocks(dense: Tensor, block: int) -> BlockSparse:
    """Return a matrix without its blocks of zeros, detached.

    Args:
        dense: ``(N, K)``, both multiples of ``block``.
        block: 16 or 32.

    Raises:
        ValueError: the width is another, or the matrix is no multiple of it.
    """
    if block not in BLOCKS:
        raise ValueError(f"block: {block} is not known; choose from: 16, 32")
    _check_matrix(dense)
    rows, columns = dense.shape
    if rows % block or columns % block:
        raise ValueError(f"block: {rows} x {columns} is no multiple of {block}; give another width")
    blocks = dense.detach().reshape(rows // block, block, columns // block, block)
    kept = blocks.ne(0).any(dim=3).any(dim=1)
    row, column = kept.nonzero(as_tuple=True)
    starts = torch.zeros(len(kept) + 1, dtype=torch.int64, device=dense.device)
    torch.cumsum(kept.sum(dim=1), dim=0, out=starts[1:])
    values = large_pages.copied(blocks.permute(0, 2, 3, 1)[row, column])
    return BlockSparse(values, column.to(torch.int32), starts, (rows, columns))


def pack_groups(dense: Tensor, n: int, m: int) -> GroupSparse:
    """Return a matrix without the zeros of its groups, detached.

    Args:
        dense: ``(N, K)``, K a multiple of ``m``; of every ``m`` inputs of a row at most ``n`` are
            not zero.
        n: 1 to ``m``.
        m: at most 8.

    Raises:
        ValueError: the sizes do not fit, or a group has more than ``n`` numbers.
    """
    if not 1 <= n <= m <= MOST_GROUP:
        raise ValueError(f"n, m: {n}:{m} is not known; give 1 <= n <= m <= {MOST_GROUP}")
    _check_matrix(dense)
    rows, columns = dense.shape
    if columns % m:
        raise ValueError(f"m: {columns} inputs are no multiple of {m}; give another m")
    groups = dense.detach().reshape(rows, columns // m, m)
    kept = groups.ne(0)
    most = int(kept.sum(dim=-1).amax()) if kept.numel() else 0
    if most > n:
        raise ValueError(f"n: a group has {most} numbers that are not zero; give n {most}, or mask")
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :n]
    values = _in_panels(groups.gather(-1, order).reshape(rows, -1))
    places = _in_panels(order.to(torch.uint8).reshape(rows, -1))
    low, high = places.split(PANEL // 2, dim=-1)
    semi = semi_structured.pack(dense.detach()) if (n, m) == (2, 4) else None
    shape = (rows, columns)
    return GroupSparse(large_pages.copied(values), low | high << 4, n, m, shape, semi)


def _in_panels(rows_NC: Tensor) -> Tensor:
    """Return ``(panels, C, 32)``, zeros behind the last row."""
    filled = torch.nn.functional.pad(rows_NC, (0, 0, 0, -len(rows_NC) % PANEL))
    return filled.reshape(-1, PANEL, rows_NC.shape[1]).transpose(1, 2).contiguous()


def _check_matrix(dense: Tensor) -> None:
    if dense.ndim != 2 or not dense.is_floating_point():
        kind = f"{tuple(dense.shape)} in {str(dense.dtype).removeprefix('torch.')}"
        raise ValueError(f"dense: give a floating matrix (N, K), not {kind}")
