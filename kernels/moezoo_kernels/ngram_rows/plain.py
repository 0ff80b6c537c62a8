"""``ngram_rows`` by operators on whole tensors: any device; on a CPU numpy divides.

Shapes: L tokens known of a sequence, S of them addressed, T of all sequences, O orders, H heads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 14  # tokens whose mixes stay in a core's cache


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
    by_distance = tokens_by_distance(token_ids, mask, classes, orders, boundary, length)
    shape = by_distance[0].shape
    tokens = [each.reshape(-1) for each in by_distance]
    if multipliers.numel():
        rows_HT = _mixed(tokens, multipliers, sizes, offsets)
    else:
        rows_HT = _polynomials(tokens, classes.numel() - 1, sizes, offsets)
    return rows_HT.t().reshape(*shape, len(sizes))


def tokens_by_distance(
    token_ids: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    orders: int,
    boundary: int | None,
    length: int,
) -> list[Tensor]:
    """Return the classes at distances 0 … O before each place, ``(..., S)`` each."""
    missing = length + orders - token_ids.shape[-1]
    tokens, nowhere = classes[token_ids], classes[-1]
    # True where the token to the right sees nothing of this one.
    ends = None if boundary is None else token_ids == boundary
    if mask is not None:
        ends = ~mask if ends is None else ends | ~mask
    if missing > 0:
        outside = nowhere.expand(*tokens.shape[:-1], missing)
        tokens = torch.cat([outside, tokens], dim=-1)
        if ends is not None:
            ends = torch.cat([torch.zeros_like(outside, dtype=torch.bool), ends], dim=-1)
    last = tokens.shape[-1] - length
    found = [tokens[..., last:]]
    hidden: Tensor | None = None
    for distance in range(1, orders + 1):
        here = slice(last - distance, last - distance + length)
        earlier = tokens[..., here]
        if ends is not None:
            hidden = ends[..., here] if hidden is None else hidden | ends[..., here]
            earlier = torch.where(hidden, nowhere, earlier)
        found.append(earlier)
    return found


def _mixed(
    tokens: list[Tensor], multipliers: Tensor, sizes: list[int], offsets: list[int]
) -> Tensor:
    """Return the rows ``(H, T)`` of tokens ``(T,)`` at each distance."""
    mix_T, mixes = tokens[0] * multipliers[0], []
    for distance in range(1, len(tokens)):
        mix_T = mix_T ^ (tokens[distance] * multipliers[distance])
        mixes.append(mix_T)
    return remainders(torch.stack(mixes), sizes, offsets)


def _polynomials(tokens: list[Tensor], base: int, sizes: list[int], offsets: list[int]) -> Tensor:
    """Return the rows ``(H, T)`` by Horner's rule, of products below 2^63."""
    rows, per_order = [], len(sizes) // (len(tokens) - 1)
    for head, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        order = 2 + head // per_order
        value = tokens[order - 1] % size
        for distance in range(order - 2, -1, -1):
            value = (value * base + tokens[distance]) % size
        rows.append(value + offset)
    return torch.stack(rows)


@torch.library.custom_op("moezoo::ngram_remainders", mutates_args=())
def remainders(mixes: Tensor, sizes: list[int], offsets: list[int]) -> Tensor:
    """Return ``mix mod size + offset`` of each head, ``(H, T)``, the heads of an order in turn.

    On a CPU by numpy, which divides vectors by one number, where torch divides one by one.

    Args:
        mixes: ``(O, T)`` int64, not negative; each order's.
        sizes: of the H heads, as many of each order.
        offsets: of the heads.
    """
    orders, count = mixes.shape
    per_order = len(sizes) // orders
    heads = list(enumerate(zip(sizes, offsets, strict=True)))
    if mixes.device.type != "cpu":
        return plain_remainders(mixes, sizes, offsets)
    # Its large arrays are of large pages, which are there sooner than many small ones.
    found_HT = np.empty((len(sizes), count), np.uint64)
    mixes_OT = mixes.numpy().view(np.uint64)
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        whole = np.empty(min(_BLOCK, count - start), np.uint64)
        for head, (size, offset) in heads:
            mix, found = mixes_OT[head // per_order, block], found_HT[head, block]
            np.floor_divide(mix, np.uint64(size), out=whole)
            np.multiply(whole, np.uint64(size), out=whole)
            np.subtract(mix, whole, out=found)
            np.add(found, np.uint64(offset), out=found)
    return torch.from_numpy(found_HT.view(np.int64))


def plain_remainders(mixes: Tensor, sizes: list[int], offsets: list[int]) -> Tensor:
    """Return the same by torch's operators."""
    per_order = len(sizes) // len(mixes)
    heads = enumerate(zip(sizes, offsets, strict=True))
    return torch.stack([mixes[h // per_order] % size + offset for h, (size, offset) in heads])


@remainders.register_fake
def _(mixes: Tensor, sizes: list[int], offsets: list[int]) -> Tensor:
    return mixes.new_empty(len(sizes), mixes.shape[1])
