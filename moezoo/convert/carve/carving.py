"""From a block and calibration inputs to a plan, and what it is worth.

Shapes: T tokens, D d_model, F neurons, N routed experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.oracle import agreement, contributions
from moezoo.convert.carve.prune import PRUNE_METHODS, PruneMethod, prune
from moezoo.convert.carve.refit import STRENGTHS, Missing, fit_change, missing, whole
from moezoo.convert.carve.routers import fit_router
from moezoo.convert.carve.samples import Sample, Samples, split_samples
from moezoo.convert.carve.splits import Partition, split_neurons
from moezoo.convert.plan import Expert, LayerPlan
from moezoo.errors import InputError, check_choice, check_int, check_number

_CHOSEN_ON = 0.1
"""Share of the tokens on which pruning chooses its ridge."""


@dataclass(frozen=True)
class Carved:
    """A plan, and what was measured of it.

    Attributes:
        plan: how the block becomes a mixture.
        figures: on the held-out tokens: ``overlap`` and ``exact``, the router's agreement with the
            contribution oracle, what chance gives of both (``chance_overlap``, ``chance_exact``),
            ``busiest``, the largest load of an expert over the mean (1 + MaxVio); ``error``, the
            length of what the outputs are off by over that of the wanted outputs,
            ``error_unfitted`` before the refit, and ``error_static`` of static pruning to the
            neurons that a token uses; of the ``cmoe`` router also ``representative_rate`` and
            ``median_rate``, how often such neurons are marked. ``router_ridge`` and
            ``refit_ridge`` are the strengths that were taken. Then ``held_out_tokens`` (0: all
            were fitted to), and seconds.
    """

    plan: LayerPlan
    figures: dict[str, float]


@torch.no_grad()
def carve_block(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    options: CarveOptions = CarveOptions(),  # noqa: B008 - frozen
    act: Callable[[Tensor], Tensor] = F.silu,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    target: Tensor | None = None,
    apart: Tensor | None = None,
) -> Carved:
    """Cut a dense block into shared and routed experts.

    Computed in fp32 (fp64 for fp64 inputs), where ``x`` is; needs ``4 T F`` bytes for the
    activations and, for the refit, about ``12 F²``. The same inputs, options and device give the
    same plan.

    Args:
        x: ``(T, D)`` inputs of the block on calibration text, at best those it gets behind
            layers that are carved already.
        gate: ``(F, D)``; None for a plain MLP.
        up: ``(F, D)``.
        down: ``(D, F)``.
        options: how to carve.
        act: the activation.
        bias_in: ``(F,)``, of a plain MLP.
        bias_out: ``(D,)``.
        target: ``(T, D)`` outputs that the refit aims at; default the dense block's. Behind layers
            that are carved already, one that makes up for what they are off by.
        apart: ``(T,)`` bool, true at tokens that no statistic looks at and whose outputs the refit
            keeps: the first of each text, whose activations may dwarf all others'.

    Returns:
        The plan, and figures that were measured of it.

    Raises:
        InputError: options or shapes do not fit, or the inputs are not finite.
    """
    block, x = _prepare(x, Block(gate, up, down, act, bias_in, bias_out))
    options.check(block.width)
    clock = _Clock()
    samples = split_samples(block, x, *_checked(x, target, apart), options.held_out)
    partition = split_neurons(block, samples, options)
    clock.stop("split")
    router, figures = fit_router(block, samples, partition, options)
    plan = LayerPlan(
        experts=tuple(Expert(e, out_scale=options.output_scale) for e in partition.experts),
        top_k=options.active,
        weighting="unit",
        shared=Expert(partition.shared) if options.shared else None,
        **vars(router),
    )
    clock.stop("router")
    unfitted = plan
    if options.refit:
        plan, figures["refit_ridge"] = _refitted(plan, block, samples, partition, options)
        clock.stop("refit")
    return Carved(plan, figures | _measured(plan, unfitted, block, samples, options, clock))


def _refitted(
    plan: LayerPlan, block: Block, samples: Samples, partition: Partition, options: CarveOptions
) -> tuple[LayerPlan, float]:
    """Fit ``down`` anew; return the plan with it, and the strength of the ridge."""
    bias = block.bias_out is not None if options.bias is None else options.bias
    labels = partition.labels().to(samples.fitted.x.device)

    def left(sample: Sample) -> Iterator[Missing]:
        scale_TN = _weights(plan, block, sample) * options.output_scale
        return missing(sample.hidden, scale_TN, labels, block.down, sample.wanted)

    strengths = STRENGTHS if options.refit_ridge is None else (options.refit_ridge,)
    change = fit_change(
        left(samples.fitted),
        strengths,
        bias,
        whole(left(samples.held_out)) if len(strengths) > 1 else None,
        whole(left(samples.exact)),
    )
    constant = change.constant
    if constant is not None and block.bias_out is not None:
        constant = constant + block.bias_out
    return replace(plan, down=block.down + change.weight, bias=constant), change.strength


def _measured(
    plan: LayerPlan,
    unfitted: LayerPlan,
    block: Block,
    samples: Samples,
    options: CarveOptions,
    clock: _Clock,
) -> dict[str, float]:
    """Measure a plan on the held-out tokens."""
    judged = samples.judged
    experts = torch.stack([expert.neurons for expert in plan.experts])
    size_TN = contributions(judged.hidden, experts, block.down)
    figures = agreement(_logits(plan, block, judged), size_TN, options.active)
    keep = block.width // options.experts * (options.shared + options.active)
    static = prune(block, samples, keep, "static", (), bias=False)
    wanted = judged.wanted if block.bias_out is None else judged.wanted + block.bias_out
    return {
        **figures,
        "error": _relative_error(_run(plan, block, judged.x), wanted),
        "error_unfitted": _relative_error(_run(unfitted, block, judged.x), wanted),
        "error_static": _relative_error(static.run(judged.x), wanted),
        "held_out_tokens": float(len(samples.held_out)),
        **clock.seconds(),
    }


@torch.no_grad()
def prune_block(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    keep: int,
    method: PruneMethod = "static",
    act: Callable[[Tensor], Tensor] = F.silu,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    refit_ridge: float | None = 1e-1,
    bias: bool | None = None,
    target: Tensor | None = None,
    apart: Tensor | None = None,
) -> Block:
    """Prune a dense block to the same neurons for all tokens, the baseline of carving.

    Args:
        x: ``(T, D)`` calibration inputs; the others as for :func:`carve_block`.
        gate: as there.
        up: as there.
        down: as there.
        keep: neurons to keep; of a carved block, those that a token uses.
        method: see :func:`moezoo.convert.carve.prune.prune`.
        act: as there.
        bias_in: as there.
        bias_out: as there.
        refit_ridge: regularisation of ``static_ls``; None: chosen on the last tenth of the tokens,
            which nothing is fitted to then.
        bias: let ``static_ls`` fit a bias; default: where the block has one.
        target: as there.
        apart: as there.

    Returns:
        The block that is left, in fp32 (fp64 for fp64 inputs); its ``bias_out`` holds what
        compensates for the rest, on top of the dense block's.
    """
    block, x = _prepare(x, Block(gate, up, down, act, bias_in, bias_out))
    check_choice("method", method, PRUNE_METHODS)
    check_int("keep", keep, maximum=block.width)
    if refit_ridge is not None:
        check_number("refit_ridge", refit_ridge)
    fit_bias = block.bias_out is not None if bias is None else bias
    held_out = _CHOSEN_ON if refit_ridge is None else 0.0
    samples = split_samples(block, x, *_checked(x, target, apart), held_out)
    strengths = STRENGTHS if refit_ridge is None else (refit_ridge,)
    return prune(block, samples, keep, method, strengths, fit_bias)


def _relative_error(found_TD: Tensor, wanted_TD: Tensor) -> float:
    """Divide the length of a difference by that of what was wanted, over all tokens."""
    return float((found_TD - wanted_TD).norm() / wanted_TD.norm().clamp(min=1e-30))


def _logits(plan: LayerPlan, block: Block, sample: Sample) -> Tensor:
    return plan.logits(_seen(plan, block, sample), block.act)


def _weights(plan: LayerPlan, block: Block, sample: Sample) -> Tensor:
    return plan.weights(_seen(plan, block, sample), block.act)


def _seen(plan: LayerPlan, block: Block, sample: Sample) -> Tensor:
    return plan.router_input(sample.x, block.gate, block.up, block.act, block.bias_in)


def _run(plan: LayerPlan, block: Block, x_TD: Tensor) -> Tensor:
    return plan.run(
        x_TD, block.gate, block.up, block.down, block.act, block.bias_in, block.bias_out
    )


def _prepare(x: Tensor, block: Block) -> tuple[Block, Tensor]:
    """Check the inputs, and bring them and the block to one dtype."""
    if x.ndim != 2 or x.shape[1] != block.d_model or not len(x):
        raise InputError(
            f"x: shape {tuple(x.shape)} is not (tokens, {block.d_model}), the block's inputs"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not bool(x.isfinite().all()):
        raise InputError("x: the calibration inputs hold NaN or infinity; check the weights")
    return block.to(dtype), x.to(dtype)


def _checked(
    x: Tensor, target: Tensor | None, apart: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what a carve aims at and leaves apart, on the device and in the dtype of ``x``."""
    if target is not None and target.shape != x.shape:
        raise InputError(f"target: shape {tuple(target.shape)} is not {tuple(x.shape)}, that of x")
    if apart is not None and (apart.shape != x.shape[:1] or apart.dtype != torch.bool):
        raise InputError(f"apart: give a bool for each of the {len(x)} tokens of x")
    if apart is not None and bool(apart.all()):
        raise InputError("apart: it leaves no token to fit to; give more calibration tokens")
    return None if target is None else target.to(x), None if apart is None else apart.to(x.device)


class _Clock:
    """Seconds, by what was done."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def stop(self, part: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self._parts[f"seconds_{part}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return all parts and the total so far."""
        return self._parts | {"seconds": time.perf_counter() - self._start}
