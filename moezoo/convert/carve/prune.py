"""The baseline that routing has to beat: the same number of neurons, the same ones for all tokens.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moezoo.convert.carve.activity import importance
from moezoo.convert.carve.block import Block
from moezoo.convert.carve.elimination import elimination_order
from moezoo.convert.carve.refit import Missing, fit_change, whole
from moezoo.convert.carve.samples import Sample, Samples, always_first

PruneMethod = Literal["static", "static_mean", "static_ls", "eliminated"]
PRUNE_METHODS = ("static", "static_mean", "static_ls", "eliminated")


def prune(
    block: Block,
    samples: Samples,
    keep: int,
    method: PruneMethod,
    strengths: Sequence[float],
    bias: bool,
) -> Block:
    """Keep the most important neurons, and make up for the others as far as constants can.

    Args:
        block: the dense block.
        samples: its activations on calibration tokens, and the outputs that are wanted.
        keep: neurons to keep.
        method: ``static`` keeps those with the largest ``mean|h_i| ||down_i||`` as they are.
            ``static_mean`` goes by ``std(h_i)`` instead, and adds the others' mean contribution to
            the output bias (FLAP, An et al. 2023, arXiv:2312.11983). ``static_ls`` fits ``down``
            anew by least squares, with a bias if ``bias``; ``eliminated`` does so with the neurons
            that the others make up for least (ZipLM, arXiv:2302.04089).
        strengths: regularisation of the fit; of several the best on held-out tokens.
        bias: see there.
    """
    hidden_TF = samples.fitted.hidden
    varying = method == "static_mean" or (method == "static_ls" and bias)
    length_F = block.down.norm(dim=0)
    size_F = torch.linalg.vector_norm(hidden_TF, ord=1, dim=0) / len(hidden_TF)
    rating_F = importance(hidden_TF, block) if varying else size_F * length_F
    order = rating_F.argsort(descending=True, stable=True)
    if method == "eliminated":
        order = elimination_order(hidden_TF, block.down, block.width - keep)
    order = always_first(order, samples.needed)
    kept, rest = order[:keep].sort().values, order[keep:]
    small = block.take(kept)
    if method == "static":
        return small
    if method == "static_mean":
        lost = block.down[:, rest] @ hidden_TF.mean(dim=0)[rest]
        return replace(small, bias_out=_add(block.bias_out, lost))

    def missing(sample: Sample) -> Iterator[Missing]:
        for hidden, wanted in zip(
            sample.hidden.split(4096), sample.wanted.split(4096), strict=True
        ):
            counted = hidden[:, kept]
            yield Missing(counted, wanted - counted @ small.down.t())

    change = fit_change(
        missing(samples.fitted),
        strengths,
        bias,
        whole(missing(samples.held_out)) if len(strengths) > 1 else None,
        whole(missing(samples.exact)),
    )
    constant = _add(block.bias_out, change.constant)
    return replace(small, down=small.down + change.weight, bias_out=constant)


def _add(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    if bias is None or more is None:
        return more if bias is None else bias
    return torch.add(bias, more)
