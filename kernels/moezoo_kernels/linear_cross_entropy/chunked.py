"""``linear_cross_entropy`` on plain torch, a chunk of tokens at a time: any device and dtype.

Shapes: T tokens, S of them with a label, C in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A chunk has as many tokens as the hidden states are wide, so that its logits take what the weight
# takes: the weight's gradient is read and written once per chunk, the logits a few times. Measured
# on a CPU with D 256 and V 4,096 and with D 512 and V 32,000: half or twice as many tokens lose up
# to 6 %, an eighth 20 % and more. No measurement on a GPU.
_FEWEST_TOKENS = 64


class Sums(NamedTuple):
    """Sums over the tokens that have a label.

    Attributes:
        loss: scalar, the cross-entropies; fp32, or fp64 for fp64.
        z: scalar, the squares of the logarithms of the partition functions.
        of_hidden: ``(T, D)``, the gradient in hidden's dtype; None if not wanted.
        of_weight: ``(V, D)``, the gradient in fp32, or fp64 for fp64; None if not wanted.
    """

    loss: Tensor
    z: Tensor
    of_hidden: Tensor | None
    of_weight: Tensor | None


def chunk_size(tokens: int, width: int) -> int:
    """Return how many tokens a chunk has."""
    return max(1, min(tokens, max(width, _FEWEST_TOKENS)))


def scratch_bytes(tokens: int, width: int, vocabulary: int) -> int:
    """Return the bytes that a chunk's logits and their gradients take, in fp32."""
    return 2 * 4 * vocabulary * chunk_size(tokens, width)


def forward(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    ignore_index: int,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    dtype: torch.dtype,
) -> Sums:
    """Return the sums, and the gradients of ``loss + z_loss z``; products are in ``dtype``."""
    if hidden.device.type != "cpu":  # looking which tokens have a label would wait for the device
        args = (labels != ignore_index, z_loss, needs_hidden, needs_weight, dtype)
        return _sum(hidden, weight, labels, *args)
    rows_S = (labels != ignore_index).nonzero().squeeze(-1)
    if len(rows_S) == len(labels):
        return _sum(hidden, weight, labels, None, z_loss, needs_hidden, needs_weight, dtype)
    hidden_SD, labels_S = hidden[rows_S], labels[rows_S]
    sums = _sum(hidden_SD, weight, labels_S, None, z_loss, needs_hidden, needs_weight, dtype)
    if sums.of_hidden is None:
        return sums
    of_hidden = torch.zeros_like(hidden).index_copy_(0, rows_S, sums.of_hidden)
    return sums._replace(of_hidden=of_hidden)


def _sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scored: Tensor | None,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    dtype: torch.dtype,
) -> Sums:
    """Sum over tokens that all have a label, or over those that ``scored`` (T,) names."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    precise = torch.promote_types(dtype, torch.float32)
    chunk = chunk_size(tokens, hidden.shape[1])
    weight = weight.to(dtype)
    losses_T = hidden.new_zeros(tokens, dtype=precise)
    partition_T = hidden.new_zeros(tokens, dtype=precise)
    # The same memory for all chunks: fresh memory costs a page fault every 4 KiB.
    buffer_CV = hidden.new_empty(chunk, vocabulary, dtype=dtype)
    slopes_CV = hidden.new_empty(chunk, vocabulary, dtype=precise)
    product_VD = torch.empty_like(weight) if needs_weight and dtype != precise else None
    of_hidden = torch.empty_like(hidden) if needs_hidden else None
    of_weight = weight.new_zeros(weight.shape, dtype=precise) if needs_weight else None
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        hidden_CD, labels_C = hidden[part].to(dtype), labels[part]
        mask_C = None if scored is None else scored[part]
        if mask_C is not None:
            labels_C = labels_C.masked_fill(~mask_C, 0)
        place = (torch.arange(len(labels_C), device=hidden.device), labels_C)
        logits_CV, slope_CV = buffer_CV[: len(labels_C)], slopes_CV[: len(labels_C)]
        torch.mm(hidden_CD, weight.t(), out=logits_CV)
        named_C = logits_CV[place].to(precise)
        torch.log_softmax(logits_CV, dim=-1, dtype=precise, out=slope_CV)
        losses_T[part] = -slope_CV[place]
        partition_T[part] = named_C + losses_T[part]
        if not (needs_hidden or needs_weight):
            continue
        slope_CV.exp_()
        if z_loss:
            slope_CV.mul_(1 + 2 * z_loss * partition_T[part].unsqueeze(-1))
        slope_CV[place] -= 1
        if mask_C is not None:
            slope_CV.mul_(mask_C.unsqueeze(-1))
        # The logits' memory holds what is multiplied next, where that has another dtype.
        slope_CV = slope_CV if dtype == precise else logits_CV.copy_(slope_CV)
        if of_hidden is not None:
            of_hidden[part] = slope_CV @ weight
        if of_weight is not None and product_VD is None:
            of_weight.addmm_(slope_CV.t(), hidden_CD)
        elif of_weight is not None:
            of_weight.add_(torch.mm(slope_CV.t(), hidden_CD, out=product_VD))
    if scored is not None:
        losses_T.masked_fill_(~scored, 0)
        partition_T.masked_fill_(~scored, 0)
    return Sums(losses_T.sum(), partition_T.square().sum(), of_hidden, of_weight)
