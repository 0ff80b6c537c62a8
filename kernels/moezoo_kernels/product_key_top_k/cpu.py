"""``product_key_top_k`` for CPUs, in C++: one pass over each row, in cache.

Shapes: T tokens, H heads, n half scores per codebook, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import fresh, native


def forward(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return scores (T, H, K) and slots (T, H, K) int64, best first."""
    halves = with_dense_rows(halves)
    _, tokens, heads, n = halves.shape
    scores = native.floats(tokens, heads, top_k)
    slots = torch.empty(tokens, heads, top_k, dtype=torch.int64)
    memory, strides = in_memory_order(halves), halves.stride()[:3]
    native.call(
        "moezoo_product_key_top_k", memory, *strides, scores, slots, tokens, heads, n, top_k
    )
    return scores, slots


def backward(grad: Tensor, slots: Tensor, n: int, by_head: bool) -> Tensor:
    """Return the gradient of the halves, (2, T, H, n), laid out as they were."""
    halves = empty_halves(grad, n, by_head)
    tokens, heads, top_k = slots.shape
    sizes = (tokens, heads, n, top_k)
    memory, strides = fresh.about_to_write(in_memory_order(halves)), halves.stride()[:3]
    name = "moezoo_product_key_top_k_backward"
    native.call(name, grad.contiguous(), slots.contiguous(), memory, *strides, *sizes)
    return halves


def is_by_head(halves: Tensor) -> bool:
    """Return whether (2, T, H, n) half scores lie in memory as (H, 2, T, n), from one product."""
    return halves.stride(2) > halves.stride(0)


def with_dense_rows(halves: Tensor) -> Tensor:
    """Return half scores that lie in memory as (H, 2, T, n) or (2, T, H, n): a copy if need be."""
    if not is_by_head(halves):
        return halves.contiguous()
    return halves.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def in_memory_order(halves: Tensor) -> Tensor:
    """Return a contiguous view of half scores with dense rows."""
    return halves if halves.is_contiguous() else halves.permute(2, 0, 1, 3)


def empty_halves(like: Tensor, n: int, by_head: bool) -> Tensor:
    """Return an empty (2, T, H, n) of ``like``'s (T, H, K) kind, in the memory layout asked for."""
    tokens, heads, _ = like.shape
    if by_head:
        return like.new_empty(heads, 2, tokens, n).permute(1, 2, 0, 3)
    return like.new_empty(2, tokens, heads, n)
