"""Linear maps whose matrices are mostly zero, packed once and multiplied without their zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.linear import linear
from moezoo_kernels.sparse_linear import op, reference, semi_structured
from moezoo_kernels.sparse_linear.matrices import (
    BLOCKS,
    MOST_GROUP,
    BlockSparse,
    GroupSparse,
    pack_blocks,
    pack_groups,
)
from moezoo_kernels.sparse_linear.paying import MOST_GROUPED_TOKENS, pays


def sparse_linear(
    x: Tensor, matrix: BlockSparse | GroupSparse, bias: Tensor | None = None
) -> Tensor:
    """Multiply by a matrix of which zeros are left out: ``y = x W^T + bias``.

    The matrix is fixed: gradients reach ``x`` and the bias, through a dense product. Saved for the
    backward is the matrix. Same inputs give bit-identical results, with any number of threads.

    Args:
        x: ``(..., K)``, any floating dtype.
        matrix: by :func:`pack_blocks` or :func:`pack_groups`, in ``x``'s dtype.
        bias: ``(N,)`` in the same dtype, or None.

    Returns:
        ``(..., N)``, in the dtype of ``x`` (or of autocast, which casts the matrix in every call).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a forced backend cannot run.
    """
    x = autocast(x)
    if torch.is_autocast_enabled(x.device.type):
        matrix = matrix.to(x.dtype)
    bias = None if bias is None else autocast(bias)
    _check(x, matrix, bias)
    tokens = x.reshape(-1, x.shape[-1])
    name = "block_sparse_linear" if isinstance(matrix, BlockSparse) else "n_m_linear"
    run = backends.choose(name, x.device, x.dtype, prefer=_preferred(matrix, tokens))
    output: Tensor = run(tokens, matrix, bias)
    return output.reshape(*x.shape[:-1], matrix.shape[0])


def _preferred(matrix: BlockSparse | GroupSparse, tokens: Tensor) -> str | None:
    """Return ``torch`` for what the first backend has no product of, or a slower one."""
    if isinstance(matrix, BlockSparse):
        return None
    if tokens.device.type == "cpu":
        return None if len(tokens) <= MOST_GROUPED_TOKENS.get(tokens.dtype, 0) else "torch"
    return None if matrix.semi is not None else "torch"


def _fused(
    x: Tensor, matrix: BlockSparse | GroupSparse, bias: Tensor | None, backend: str
) -> Tensor:
    _, n, m = matrix.sizes
    return op.sparse_linear(x, *matrix.tensors, bias, matrix.shape[0], n, m, backend)


def _semi_structured(x: Tensor, matrix: GroupSparse, bias: Tensor | None) -> Tensor:
    if matrix.semi is None:
        raise ValueError(
            "sparse_linear: sparse tensor cores read 2:4 matrices that were packed on the GPU and "
            "have sides that are multiples of 64; leave the backend to be chosen"
        )
    return semi_structured.multiply(x, matrix.semi, bias)


def _torch(x: Tensor, matrix: BlockSparse | GroupSparse, bias: Tensor | None) -> Tensor:
    return linear(x, matrix.dense(), bias)


def _check(x: Tensor, matrix: BlockSparse | GroupSparse, bias: Tensor | None) -> None:
    rows, columns = matrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        shape = tuple(x.shape)
        raise ValueError(f"x: shape is {shape}; the matrix reads {columns} numbers, the last dim")
    if matrix.values.dtype != x.dtype:
        raise ValueError(
            f"matrix: dtype is {matrix.values.dtype}, of x {x.dtype}; give matrix.to(x.dtype)"
        )
    if matrix.values.device != x.device:
        raise ValueError(
            f"matrix: it lies on {matrix.values.device}, x on {x.device}; pack it where x is"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        found = f"{tuple(bias.shape)} in {bias.dtype}"
        raise ValueError(f"bias: it is {found}; give ({rows},) in {x.dtype}")


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _register(name: str, *fused: backends.Backend) -> None:
    plain: tuple[tuple[str, Callable[..., Tensor]], ...] = (
        ("torch", _torch),
        ("reference", reference.sparse_linear),
    )
    last = (backends.Backend(name, function, _anywhere) for name, function in plain)
    backends.register(name, *fused, *last)


_cpu = backends.Backend("cpu", partial(_fused, backend="cpu"), native.unusable)
_register(
    "block_sparse_linear",
    _cpu,
    backends.Backend("triton", partial(_fused, backend="triton"), triton_support.unusable),
)
_register(
    "n_m_linear",
    _cpu,
    backends.Backend("semi_structured", _semi_structured, semi_structured.unusable),
)

__all__ = [
    "BLOCKS",
    "MOST_GROUP",
    "BlockSparse",
    "GroupSparse",
    "pack_blocks",
    "pack_groups",
    "pays",
    "sparse_linear",
]
