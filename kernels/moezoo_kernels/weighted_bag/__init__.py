"""Bags of weighted rows of a table: what a memory layer reads (arXiv:1907.05242, 2412.09764)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.weighted_bag import op, reference


def weighted_bag(
    table: Tensor, indices: Tensor, weights: Tensor, *, sparse: bool = False
) -> Tensor:
    """Sum weighted rows of a table: ``y[t] = Σ_j weights[t, j] table[indices[t, j]]``.

    An index of -1 costs nothing, adds nothing, and its weight gets gradient zero. A row may stand
    in several slots of a token. No ``(T, J, V)`` tensor exists in either direction, and no atomics
    are used: same inputs give bit-identical results and gradients. Autocast changes nothing: only
    the rows that are read could be cast, which costs more than it saves.

    The table's gradient is a sum over each row's run of the sorted assignments, the reverse indices
    of Berges et al. 2024 (arXiv:2412.09764, section 3.2).

    Args:
        table: ``(N, V)``, any floating dtype; sums are in fp32 where that is shorter.
        indices: ``(T, J)`` int64 rows; -1 for none.
        weights: ``(T, J)``, any floating dtype.
        sparse: give the table's gradient as a coalesced sparse tensor of the rows that were read
            (for ``torch.optim.SparseAdam`` or ``SGD``); not under ``torch.compile``.

    Returns:
        ``(T, V)`` in the table's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, an index is out of range, sparse gradients under
            ``torch.compile``, or a forced backend that cannot run.
    """
    _check(table, indices, weights)
    if sparse and torch.compiler.is_compiling():
        raise ValueError("sparse: torch.compile has no sparse gradients; set it to false")
    run = backends.choose("weighted_bag", table.device, table.dtype)
    return run(table, indices, weights, sparse=sparse)


def _fused(
    table: Tensor, indices: Tensor, weights: Tensor, *, sparse: bool, backend: str
) -> Tensor:
    if backend == "torch" and not torch.compiler.is_compiling() and _has_kernel(table):
        native.warn_once()
    weights = weights.to(torch.promote_types(table.dtype, torch.float32))
    return op.forward(table, indices, weights, sparse, backend)


def _check(table: Tensor, indices: Tensor, weights: Tensor) -> None:
    if table.ndim != 2 or indices.ndim != 2:
        shapes = f"table {tuple(table.shape)}, indices {tuple(indices.shape)}"
        raise ValueError(f"weighted_bag: give table (N, V) and indices (T, J), not {shapes}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices: dtype is {indices.dtype}; give torch.int64")
    if weights.shape != indices.shape:
        raise ValueError(
            f"weights: shape is {tuple(weights.shape)}, indices have {tuple(indices.shape)}"
        )


def _has_kernel(table: Tensor) -> bool:
    return table.device.type == "cpu" and table.dtype in (torch.float32, torch.bfloat16)


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "weighted_bag",
    backends.Backend("cpu", partial(_fused, backend="cpu"), native.unusable),
    backends.Backend("triton", partial(_fused, backend="triton"), triton_support.unusable),
    backends.Backend("torch", partial(_fused, backend="torch"), _anywhere),
    backends.Backend("reference", reference.weighted_bag, _anywhere),
)

__all__ = ["weighted_bag"]
