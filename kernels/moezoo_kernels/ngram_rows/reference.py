"""``ngram_rows`` from its formula, token by token, in whole numbers of any size."""

from __future__ import annotations

import torch
from torch import Tensor


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
    sequences = token_ids.reshape(-1, token_ids.shape[-1]).tolist()
    real = [[True] * len(ids) for ids in sequences]
    if mask is not None:
        real = mask.reshape(-1, token_ids.shape[-1]).tolist()
    numbers, factors = classes.tolist(), multipliers.tolist()
    found = []
    for ids, present in zip(sequences, real, strict=True):
        for place in range(len(ids) - length, len(ids)):
            tokens = [numbers[ids[place]]]
            begin = place  # the first token that this one sees
            while begin > 0 and present[begin - 1] and ids[begin - 1] != boundary:
                begin -= 1
            for at in range(place - 1, place - orders - 1, -1):
                tokens.append(numbers[ids[at]] if at >= begin else numbers[-1])
            for head, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
                last = 2 + head // (len(sizes) // orders)
                found.append(_mix(tokens[:last], factors, len(numbers) - 1) % size + offset)
    shape = (*token_ids.shape[:-1], length, len(sizes))
    return torch.tensor(found, dtype=torch.int64, device=token_ids.device).reshape(shape)


def _mix(tokens: list[int], factors: list[int], base: int) -> int:
    if not factors:
        return sum(token * base**distance for distance, token in enumerate(tokens))
    mix = 0
    for token, factor in zip(tokens, factors, strict=False):
        mix ^= token * factor
    return mix
