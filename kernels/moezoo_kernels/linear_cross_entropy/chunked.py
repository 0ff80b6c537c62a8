"""``linear_cross_entropy`` a chunk of tokens at a time: the products, and what is between them.

Shapes: T tokens, S of them with a label, C in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels.linear import multiply, suits
from moezoo_kernels.linear_cross_entropy import cpu, plain

_SOFTMAX: dict[str, type[cpu.Softmax] | type[plain.Softmax]] = {
    "cpu": cpu.Softmax,
    "torch": plain.Softmax,
}
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
    backend: str,
) -> Sums:
    """Return the sums, and the gradients of ``loss + z_loss z``; products are in ``dtype``."""
    options = (z_loss, needs_hidden, needs_weight, dtype, backend)
    scored_T = labels != ignore_index
    if hidden.device.type != "cpu":  # finding the tokens that have a label would wait for it
        return _sum(hidden, weight, labels, scored_T, *options)
    rows_S = scored_T.nonzero().squeeze(-1)
    if len(rows_S) == len(labels):
        return _sum(hidden, weight, labels, None, *options)
    sums = _sum(hidden[rows_S], weight, labels[rows_S], None, *options)
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
    backend: str,
) -> Sums:
    """Sum over tokens that all have a label, or over those that ``scored`` (T,) names."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    precise = torch.promote_types(dtype, torch.float32)
    chunk = chunk_size(tokens, hidden.shape[1])
    weight = weight.to(dtype)
    losses_T = hidden.new_zeros(tokens, dtype=precise)
    partitions_T = hidden.new_zeros(tokens, dtype=precise)
    # Where oneDNN multiplies twice as fast, its results' fresh memory costs a part of that, and the
    # buffer below is never touched.
    fast = suits(hidden[:chunk].to(dtype), weight)
    # The same memory for all chunks: fresh memory costs a page fault every 4 KiB.
    buffer_CV = hidden.new_empty(chunk, vocabulary, dtype=dtype)
    softmax = _SOFTMAX[backend](buffer_CV)
    of_hidden = torch.empty_like(hidden) if needs_hidden else None
    of_weight = None
    if needs_weight:  # the first product of oneDNN's takes its place
        of_weight = weight.new_zeros((0,) if fast else weight.shape, dtype=precise)
    product_VD = torch.empty_like(weight) if needs_weight and dtype != precise else None
    slopes = needs_hidden or needs_weight
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        hidden_CD, labels_C = hidden[part].to(dtype), labels[part]
        if scored is not None:
            labels_C = labels_C.masked_fill(~scored[part], 0)
        if fast:
            logits_CV = multiply(hidden_CD, weight)
        else:
            logits_CV = torch.mm(hidden_CD, weight.t(), out=buffer_CV[: len(labels_C)])
        found = (losses_T[part], partitions_T[part])
        slope_CV = softmax(logits_CV, labels_C, *found, z_loss, slopes)
        if scored is not None and slopes:
            slope_CV.mul_(scored[part].unsqueeze(-1))
        if of_hidden is not None:
            of_hidden[part] = multiply(slope_CV, weight.t())
        if of_weight is not None and fast:
            made_VD = multiply(slope_CV.t(), hidden_CD.t())
            of_weight = of_weight.add_(made_VD) if start else made_VD
        elif of_weight is not None and product_VD is None:
            of_weight.addmm_(slope_CV.t(), hidden_CD)
        elif of_weight is not None:
            of_weight.add_(torch.mm(slope_CV.t(), hidden_CD, out=product_VD))
    if scored is not None:
        losses_T.masked_fill_(~scored, 0)
        partitions_T.masked_fill_(~scored, 0)
    return Sums(losses_T.sum(), partitions_T.square().sum(), of_hidden, of_weight)
