"""``sparse_linear`` from what its formats mean, a block or a number at a time."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.sparse_linear.matrices import PANEL, BlockSparse, GroupSparse


def sparse_linear(x: Tensor, matrix: BlockSparse | GroupSparse, bias: Tensor | None) -> Tensor:
    """Return ``x (T, K)`` times the matrix, ``(T, N)``."""
    written = _of_blocks(matrix) if isinstance(matrix, BlockSparse) else _of_groups(matrix)
    return F.linear(x, written, bias)


def _of_blocks(matrix: BlockSparse) -> Tensor:
    dense, block = matrix.values.new_zeros(matrix.shape), matrix.block
    starts, columns = matrix.starts.tolist(), matrix.columns.tolist()
    for row, (begin, end) in enumerate(pairwise(starts)):
        for i in range(begin, end):
            rows = slice(row * block, (row + 1) * block)
            dense[rows, columns[i] * block : (columns[i] + 1) * block] = matrix.values[i].t()
    return dense


def _of_groups(matrix: GroupSparse) -> Tensor:
    dense = matrix.values.new_zeros(matrix.shape)
    places = matrix.places.tolist()
    for row in range(matrix.shape[0]):
        panel, lane = divmod(row, PANEL)
        for step, packed in enumerate(places[panel]):
            byte = packed[lane % 16]
            place = byte >> 4 if lane >= 16 else byte & 15
            value = matrix.values[panel, step, lane]
            if value != 0:  # another entry of the group may have its place
                dense[row, step // matrix.n * matrix.m + place] = value
    return dense
