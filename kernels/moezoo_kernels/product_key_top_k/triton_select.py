"""``product_key_top_k`` in Triton: a program per row of both halves, whose scores it sorts.

A score and its position are sorted as one integer: the score, mapped to an integer of the same
order, above the inverted position. So equal scores go by the lower position, as the rule wants it,
and no two keys are equal.

Shapes: T tokens, H heads, n half scores per codebook, K choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo_kernels.product_key_top_k import staircase
from moezoo_kernels.product_key_top_k.cpu import empty_halves, in_memory_order, with_dense_rows
from moezoo_kernels.triton_support import configurations, on_its_device

# Rows longer than this, and K² pairs of more than these, do not fit into a program's registers.
_MOST_KEYS, _MOST_CHOICES = 4096, 64


@triton.jit
def _ordered(value: tl.tensor) -> tl.tensor:
    """Map floats to int32 of the same order: zeros are equal, a NaN is the greatest."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(value: tl.tensor, position: tl.tensor, present: tl.tensor) -> tl.tensor:
    lower = (~position).to(tl.int64) & 0xFFFFFFFF
    keys = (_ordered(value).to(tl.int64) << 32) | lower
    return tl.where(present, keys, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _values(keys: tl.tensor) -> tl.tensor:
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _positions(keys: tl.tensor) -> tl.tensor:
    return ~(keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _best_of_half(
    scores: tl.tensor, n: tl.constexpr, ROW: tl.constexpr, CHOICES: tl.constexpr
) -> tl.tensor:
    columns = tl.arange(0, ROW)
    inside = columns < n
    value = tl.load(scores + columns, mask=inside, other=0.0)
    return tl.topk(_keys(value, columns, inside), CHOICES)


@triton.autotune(configurations(({}, 1), ({}, 2), ({}, 4)), key=["n", "top_k"])
@triton.jit
def _select(
    halves: tl.tensor,
    scores: tl.tensor,
    slots: tl.tensor,
    half_stride: tl.int64,
    token_stride: tl.int64,
    head_stride: tl.int64,
    heads: tl.int64,
    n: tl.constexpr,
    top_k: tl.constexpr,
    ROW: tl.constexpr,
    CHOICES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    half = halves + row // heads * token_stride + row % heads * head_stride
    first = _best_of_half(half, n, ROW, CHOICES)
    second = _best_of_half(half + half_stride, n, ROW, CHOICES)

    ranks = tl.arange(0, CHOICES)
    r, s = ranks[:, None], ranks[None, :]
    sums = _values(first)[:, None] + _values(second)[None, :]
    # The pairs that fewer than K others are sure to precede; see staircase.py.
    pairs = _keys(sums, r * CHOICES + s, (r + 1) * (s + 1) <= top_k)
    best = tl.topk(tl.reshape(pairs, (CHOICES * CHOICES,)), CHOICES)
    chosen = _positions(best)

    i = tl.sum(tl.where(chosen[:, None] // CHOICES == s, _positions(first)[None, :], 0), axis=1)
    j = tl.sum(tl.where(chosen[:, None] % CHOICES == s, _positions(second)[None, :], 0), axis=1)
    inside = ranks < top_k
    tl.store(scores + row * top_k + ranks, _values(best), mask=inside)
    tl.store(slots + row * top_k + ranks, i.to(tl.int64) * n + j, mask=inside)


@triton.jit
def _scatter(
    grad: tl.tensor,
    slots: tl.tensor,
    halves: tl.tensor,
    half_stride: tl.int64,
    token_stride: tl.int64,
    head_stride: tl.int64,
    heads: tl.int64,
    n: tl.constexpr,
    top_k: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros((COLUMNS,), tl.float32)
    second = tl.zeros((COLUMNS,), tl.float32)
    for c in range(top_k):
        slot = tl.load(slots + row * top_k + c)
        value = tl.load(grad + row * top_k + c)
        first += tl.where(columns == slot // n, value, 0.0)
        second += tl.where(columns == slot % n, value, 0.0)
    half = halves + row // heads * token_stride + row % heads * head_stride + columns
    tl.store(half, first, mask=columns < n)
    tl.store(half + half_stride, second, mask=columns < n)


@on_its_device
def forward(halves: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return scores (T, H, K) and slots (T, H, K) int64, best first."""
    _, tokens, heads, n = halves.shape
    if n > _MOST_KEYS or top_k > _MOST_CHOICES:
        return staircase.product_key_top_k(halves, top_k)
    halves = with_dense_rows(halves)
    scores = halves.new_empty(tokens, heads, top_k)
    slots = torch.empty(scores.shape, dtype=torch.int64, device=halves.device)
    if scores.numel():
        operands = (in_memory_order(halves), scores, slots, *halves.stride()[:3], heads)
        # Triton's topk takes two or more of as many or more.
        choices = max(2, triton.next_power_of_2(top_k))
        row = max(choices, triton.next_power_of_2(n))
        _select[(tokens * heads,)](*operands, n, top_k, ROW=row, CHOICES=choices)
    return scores, slots


@on_its_device
def backward(grad: Tensor, slots: Tensor, n: int, by_head: bool) -> Tensor:
    """Return the gradient of the halves, (2, T, H, n), laid out as they were."""
    halves = empty_halves(grad, n, by_head)
    tokens, heads, top_k = slots.shape
    if halves.numel():
        memory, strides = in_memory_order(halves), halves.stride()[:3]
        columns = min(1024, triton.next_power_of_2(n))
        operands = (grad.contiguous(), slots.contiguous(), memory, *strides, heads)
        grid = (tokens * heads, triton.cdiv(n, columns))
        _scatter[grid](*operands, n, top_k, COLUMNS=columns)
    return halves
