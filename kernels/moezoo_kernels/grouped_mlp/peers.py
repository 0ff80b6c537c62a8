"""Other projects' kernels in place of our own, for whoever has them installed and asks for them.

Their kernels sort, gather, multiply and combine; the activation, and what they know nothing of
(slots without an expert, biases in MegaBlocks), is done around them in torch. Unlike ours, they
weight the experts' outputs in the dtype of the tokens.

Shapes: T tokens, K choices per token, D width, E experts, F hidden width, I = 2 F if gated else F.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, activate
from moezoo_kernels.grouped_mlp import reference


def grouped_mlp(
    x: Tensor,  # (T, D)
    w_in: Tensor,  # (E, I, D)
    w_out: Tensor,  # (E, D, F)
    indices: Tensor,  # (T, K)
    weights: Tensor,  # (T, K)
    *,
    package: str,
    max_assignments: int | None = None,
    **options: Any,
) -> Tensor:
    """Compute :func:`moezoo_kernels.grouped_mlp` by the kernels of ``package``.

    Args:
        x: tokens; the tensors are those of the op.
        w_in: input matrices.
        w_out: output matrices.
        indices: chosen experts. A slot of -1 goes to the first one, and counts for nothing.
        weights: router weights.
        package: ``scattermoe`` or ``megablocks``.
        max_assignments: changes nothing, as there is no buffer to bound.
        options: ``activation``, ``gated``, biases, ``glu`` and ``interleaved`` of the op.
    """
    if not indices.numel():  # their kernels ask for a token
        return reference.grouped_mlp(x, w_in, w_out, indices, weights, **options)
    weights = weights.masked_fill(indices < 0, 0.0).to(x.dtype)
    return _KERNELS[package](x, w_in, w_out, indices.clamp(min=0), weights, **options)


def _scattermoe(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    activation: str = "silu",
    gated: bool = True,
    bias_in: Tensor | None = None,  # (E, I)
    bias_out: Tensor | None = None,  # (E, D)
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Multiply by ScatterMoE's kernels, which gather and scatter on the way (arXiv:2403.08245)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order = flatten_sort_count(indices, len(w_in))
    inner = parallel_linear(
        x, w_in.mT, indices.shape[1], *order, expert_biases=bias_in, grouped_out=True
    )
    hidden = activate(inner, activation, gated, glu, interleaved)
    output: Tensor = parallel_linear(
        hidden, w_out.mT, 1, *order, expert_biases=bias_out, gates=weights, grouped_in=True
    )
    return output


def _megablocks(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    activation: str = "silu",
    gated: bool = True,
    bias_in: Tensor | None = None,  # (E, I)
    bias_out: Tensor | None = None,  # (E, D)
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Permute by MegaBlocks' kernels around its grouped GEMMs (arXiv:2211.15841)."""
    from megablocks import ops
    from megablocks.grouped_gemm_util import ops as gemm

    num_experts, choices = len(w_in), indices.shape[1]
    flat = indices.flatten().int()
    experts, order = ops.sort(flat, max(1, (num_experts - 1).bit_length()))
    counts = ops.histogram(flat, num_experts)
    bins = ops.inclusive_cumsum(counts, 0).reshape(num_experts)
    sizes = counts.cpu().long()  # grouped GEMMs are launched from them
    rows = ops.gather(x, order, experts, bins, choices)
    inner = _add(gemm.gmm(rows, w_in, sizes, trans_b=True), bias_in, experts)
    hidden = activate(inner, activation, gated, glu, interleaved)
    answers = _add(gemm.gmm(hidden, w_out, sizes, trans_b=True), bias_out, experts)
    output: Tensor = ops.scatter(answers, order, experts, weights.flatten(), bins, choices)
    return output


_KERNELS = {"scattermoe": _scattermoe, "megablocks": _megablocks}


def _add(rows: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    # An embedding's gradient is summed in a fixed order, that of indexing is not.
    return rows if bias is None else rows + F.embedding(experts.long(), bias)
