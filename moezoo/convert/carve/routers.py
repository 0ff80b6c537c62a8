"""Routers of a carved block.

Shapes: T tokens, D d_model, F neurons, N routed experts, m neurons of an expert, P what a router
reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.activity import mark_distances, rates
from moezoo.convert.carve.block import Block
from moezoo.convert.carve.least_squares import Moments
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.oracle import contributions, top_mask
from moezoo.convert.carve.prior_approximate import expert_errors, fit_prior_approximate
from moezoo.convert.carve.samples import Sample, Samples
from moezoo.convert.carve.splits import Partition, cmoe_marks
from moezoo_kernels.linear import linear

_FLATTEST = 0.01  # the largest difference of logits where unit weights are written as sigmoids
_STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_CHUNK = 4096


@dataclass(frozen=True)
class _FittedRouter:
    """A router's tensors, as :class:`~moezoo.convert.LayerPlan` names them."""

    router: Tensor
    router_bias: Tensor | None = None
    router_neurons: Tensor | None = None
    router_up: Tensor | None = None
    signed: bool = False
    reads_shared: bool = False
    flatness: float = 2.0**-8


def fit_router(
    block: Block, samples: Samples, partition: Partition, options: CarveOptions
) -> tuple[_FittedRouter, dict[str, float]]:
    """Make the router the options ask for, and figures of it."""
    fitted_to = samples.fitted
    x_TD, hidden_TF = fitted_to.x, fitted_to.hidden
    if options.router == "cmoe":
        return _neuron_router(block, x_TD, hidden_TF, partition, options)
    figures = {}
    if options.router == "gate_mean":
        fitted = _gate_mean_router(block, partition)
    elif options.router == "prior_approximate":
        errors_TN = expert_errors(block, hidden_TF, partition, options)
        weight, bias = fit_prior_approximate(x_TD, errors_TN, options.active, options.seed)
        fitted = _FittedRouter(weight, bias)
    else:
        fitted, figures["router_ridge"] = _ridge_router(block, samples, partition, options)
        x_TD = _seen(fitted_to, partition, options)
    return _even_out(fitted, x_TD), figures


def _seen(sample: Sample, partition: Partition, options: CarveOptions) -> Tensor:
    """Return what a ridge router reads: inputs, and how active shared neurons are."""
    if options.router == "ridge":
        return sample.x
    return torch.cat([sample.x, sample.hidden[:, partition.shared].abs()], dim=1)


def _ridge_router(
    block: Block, samples: Samples, partition: Partition, options: CarveOptions
) -> tuple[_FittedRouter, float]:
    """Fit a linear map to the size of experts' contributions.

    What it reads of shared neurons is not of one size: it is scaled before it is penalised.

    Returns:
        The router, and the strength of the ridge: where none is given, the one with which the
        chosen experts' contributions have the largest sum of squares on the held-out tokens.
    """
    seen_TP = _seen(samples.fitted, partition, options)
    size_TN = contributions(samples.fitted.hidden, partition.experts, block.down)
    scale_P = torch.ones_like(seen_TP[0])
    if options.router != "ridge":
        scale_P = seen_TP.std(dim=0).clamp(min=1e-30)
        scale_P = torch.where(scale_P < 1e-6 * scale_P.max(), scale_P.max(), scale_P)
    parts = zip((seen_TP / scale_P).split(_CHUNK), size_TN.split(_CHUNK), strict=True)
    moments = Moments.of(parts, intercept=True)

    def solved(strength: float) -> _FittedRouter:
        weight, bias = moments.solve(strength)
        return _FittedRouter(weight / scale_P, bias, reads_shared=options.router != "ridge")

    if options.router_ridge is not None:
        return solved(options.router_ridge), options.router_ridge
    judged_TP = _seen(samples.held_out, partition, options)
    gain_TN = contributions(samples.held_out.hidden, partition.experts, block.down).square()

    def gain(strength: float) -> float:
        router = solved(strength)
        logits_TN = linear(judged_TP, router.router, router.router_bias)
        return float((gain_TN * top_mask(logits_TN, options.active)).sum())

    best = max(sorted(_STRENGTHS, reverse=True), key=gain)
    return solved(best), best


def _gate_mean_router(block: Block, partition: Partition) -> _FittedRouter:
    """Score by the mean gate vector of an expert's neurons (ExpertWeaver, arXiv:2602.15521)."""
    source = block.up if block.gate is None else block.gate
    bias = None if block.bias_in is None else block.bias_in[partition.experts].mean(dim=1)
    return _FittedRouter(source[partition.experts].mean(dim=1), bias)


def _even_out(fitted: _FittedRouter, x_TD: Tensor) -> _FittedRouter:
    """Subtract what all experts' logits have in common, and scale the rest to one.

    Neither changes the choice. It makes the softmax of the logits, which fine-tuning starts
    from, neither flat nor hard, and keeps small numbers from being rounded away beside large ones.
    """
    weight_ND = fitted.router - fitted.router.mean(dim=0)
    bias_N = torch.zeros_like(weight_ND[:, 0])
    if fitted.router_bias is not None:
        bias_N = fitted.router_bias - fitted.router_bias.mean()
    logits_TN = linear(x_TD, weight_ND, bias_N)
    scale = float(logits_TN.square().mean(dim=0).mean().sqrt()) or 1.0
    return replace(
        fitted,
        router=weight_ND / scale,
        router_bias=None if fitted.router_bias is None else bias_N / scale,
        flatness=_FLATTEST * scale / max(float(logits_TN.abs().max()), 1e-30),
    )


def _neuron_router(
    block: Block, x_TD: Tensor, hidden_TF: Tensor, partition: Partition, options: CarveOptions
) -> tuple[_FittedRouter, dict[str, float]]:
    """Score by one neuron per expert (CMoE, arXiv:2502.04416, section 4.3).

    Returns:
        The router, and the shares of tokens that mark a representative and a median neuron
        (``representative_rate``, ``median_rate``).
    """
    marks_TK = cmoe_marks(block, x_TD, hidden_TF, options)
    neurons_N = _representatives(marks_TK, partition, options)
    cosine = options.profile == "cosine"

    def rows(weight: Tensor) -> Tensor:
        return F.normalize(weight[neurons_N], dim=1) if cosine else weight[neurons_N]

    gated = block.gate is not None
    bias = None if block.bias_in is None or cosine else block.bias_in[neurons_N]
    fitted = _FittedRouter(
        router=rows(block.up if block.gate is None else block.gate),
        router_bias=bias,
        router_neurons=neurons_N,
        router_up=rows(block.up) if gated else None,
        signed=options.signed,
    )
    share_F = rates(marks_TK, block.width).double().cpu() / len(marks_TK)
    figures = {
        "representative_rate": float(share_F[neurons_N].mean()),
        "median_rate": float(share_F[partition.experts].median(dim=1).values.mean()),
    }
    return fitted, figures


def _representatives(marks_TK: Tensor, partition: Partition, options: CarveOptions) -> Tensor:
    """Choose each expert's representative neuron, ``(N,)`` int64, the lowest of equally good ones.

    Published is the neuron whose marks are nearest to the cluster's mean. But the means are below
    one half nearly everywhere, so that every mark takes a neuron away from them (see
    :func:`~moezoo.convert.carve.activity.mark_distances`): nearest is the neuron marked least,
    mostly one that never is.
    """
    labels_F = partition.labels()
    if options.representative == "most_active":
        rate_F = rates(marks_TK, len(labels_F)).cpu()
        best = [int(neurons[rate_F[neurons].argmax()]) for neurons in partition.experts]
        return torch.tensor(best)
    on_device = labels_F.to(marks_TK.device)
    distance_FN = mark_distances(marks_TK, on_device, options.routed, options.distance).cpu()
    best = [
        int(neurons[distance_FN[neurons, e].argmin()])
        for e, neurons in enumerate(partition.experts)
    ]
    return torch.tensor(best)
