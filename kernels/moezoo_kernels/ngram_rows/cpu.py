"""``ngram_rows`` in C++ (csrc/ngram_rows.cpp): one pass over the tokens, which writes the rows.

Shapes: L tokens known of a sequence, S of them addressed, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moezoo_kernels import native

_LARGE = 1 << 22  # bytes, from which numpy's memory comes in large pages
_LINE = 8  # numbers of a cache line


def ngram_rows(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    multipliers: Tensor,
    sizes: list[int],
    offsets: list[int],
    orders: int,
    boundary: int | None,
    length: int,
) -> Tensor:
    """Return the rows, ``(..., S, H)``; arguments as for the public function."""
    constants = classes, multipliers, sizes, offsets, orders
    # Calling an operator takes longer than hashing one token.
    plain = type(token_ids) is Tensor and not torch.compiler.is_compiling()
    run = _run if plain else _ngram_rows
    return run(token_ids, mask, *constants, -1 if boundary is None else boundary, length)


def _run(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    multipliers: Tensor,
    sizes: list[int],
    offsets: list[int],
    orders: int,
    boundary: int,
    length: int,
) -> Tensor:
    rows = _empty([*token_ids.shape[:-1], length, len(sizes)])
    if not rows.numel():
        return rows
    vocabulary = classes.numel() - 1
    least, most = (int(bound) for bound in token_ids.aminmax())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(f"token_ids: {wrong} is not a token; give 0 … {vocabulary - 1}")
    native.call(
        "moezoo_ngram_rows",
        token_ids.to(torch.int64).contiguous(),
        None if mask is None else mask.contiguous(),
        classes.contiguous(),
        vocabulary,
        boundary,
        multipliers.contiguous() if multipliers.numel() else None,
        _numbers(tuple(sizes)),
        _numbers(tuple(offsets)),
        orders,
        len(sizes) // orders,
        rows.numel() // (length * len(sizes)),
        token_ids.shape[-1],
        length,
        rows,
    )
    return rows


@torch.library.custom_op("moezoo::ngram_rows", mutates_args=())
def _ngram_rows(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    multipliers: Tensor,
    sizes: list[int],
    offsets: list[int],
    orders: int,
    boundary: int,
    length: int,
) -> Tensor:
    constants = classes, multipliers, sizes, offsets, orders
    return _run(token_ids, mask, *constants, boundary, length)


@_ngram_rows.register_fake
def _(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    multipliers: Tensor,
    sizes: list[int],
    offsets: list[int],
    orders: int,
    boundary: int,
    length: int,
) -> Tensor:
    return classes.new_empty([*token_ids.shape[:-1], length, len(sizes)])


@lru_cache(maxsize=256)
def _numbers(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, device="cpu")


def _empty(shape: list[int]) -> Tensor:
    """Return memory from the start of a cache line on, in large pages if it fills some."""
    count = math.prod(shape)
    if 8 * count < _LARGE:
        return torch.empty(shape, dtype=torch.int64)
    memory = np.empty(count + _LINE, np.int64)
    begin = -memory.ctypes.data // 8 % _LINE
    return torch.from_numpy(memory[begin : begin + count]).reshape(shape)
