"""From a block and calibration inputs to a plan, and what it is worth.

Shapes: T tokens, D d_model, F neurons, N routed experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.least_squares import refit_down
from moezoo.convert.carve.options import CarveOptions
from moezoo.convert.carve.oracle import agreement, contributions
from moezoo.convert.carve.prune import PRUNE_METHODS, PruneMethod, prune
from moezoo.convert.carve.routers import fit_router
from moezoo.convert.carve.splits import split_neurons
from moezoo.convert.plan import Expert, LayerPlan
from moezoo.errors import InputError, check_choice, check_int, check_number


@dataclass(frozen=True)
class Carved:
    """A plan, and what was measured of it.

    Attributes:
        plan: how the block becomes a mixture.
        figures: on the held-out tokens: ``overlap`` and ``exact``, the router's agreement with the
            contribution oracle, what chance gives of both (``chance_overlap``, ``chance_exact``),
            ``busiest``, the largest load of an expert over the mean (1 + MaxVio); ``error``, the
            length of what the outputs are off by over that of the dense outputs,
            ``error_unfitted`` before the refit, and ``error_static`` of static pruning to the
            neurons that a token uses; of the ``cmoe`` router also ``representative_rate`` and
            ``median_rate``, how often such neurons are marked. Then
            ``held_out_tokens`` (0: all were fitted to), and seconds.
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

    Returns:
        The plan, and figures that were measured of it.

    Raises:
        InputError: options or shapes do not fit, or the inputs are not finite.
    """
    block, x = _prepare(x, Block(gate, up, down, act, bias_in, bias_out))
    options.check(block.width)
    clock = _Clock()
    fitted_to, held_out = _hold_out(x, options.held_out)
    hidden = block.activations(fitted_to)
    partition = split_neurons(block, fitted_to, hidden, options)
    clock.stop("split")
    router, figures = fit_router(block, fitted_to, hidden, partition, options)
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
        bias = block.bias_out is not None if options.bias is None else options.bias
        scale_TN = plan.weights(fitted_to, act) * options.output_scale
        labels = partition.labels().to(x.device)
        output = hidden @ block.down.t()
        refitted, constant = refit_down(
            hidden, scale_TN, labels, block.down, output, options.refit_ridge, bias
        )
        if constant is not None and block.bias_out is not None:
            constant = constant + block.bias_out
        plan = replace(plan, down=refitted, bias=constant)
        clock.stop("refit")
    measured_on = held_out if len(held_out) else fitted_to
    seen = block.activations(measured_on)
    size_TN = contributions(seen, partition.experts, block.down)
    figures |= agreement(plan.logits(measured_on, act), size_TN, options.active)
    keep = block.width // options.experts * (options.shared + options.active)
    static = prune(block, hidden, keep, "static", options.refit_ridge, bias=False)
    dense = block.run(measured_on)
    figures |= {
        "error": _relative_error(_run(plan, block, measured_on), dense),
        "error_unfitted": _relative_error(_run(unfitted, block, measured_on), dense),
        "error_static": _relative_error(static.run(measured_on), dense),
        "held_out_tokens": float(len(held_out)),
    }
    return Carved(plan, figures | clock.seconds())


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
    refit_ridge: float = 1e-1,
    bias: bool | None = None,
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
        refit_ridge: regularisation of ``static_ls``.
        bias: let ``static_ls`` fit a bias; default: where the block has one.

    Returns:
        The block that is left, in fp32 (fp64 for fp64 inputs); its ``bias_out`` holds what
        compensates for the rest, on top of the dense block's.
    """
    block, x = _prepare(x, Block(gate, up, down, act, bias_in, bias_out))
    check_choice("method", method, PRUNE_METHODS)
    check_int("keep", keep, maximum=block.width)
    check_number("refit_ridge", refit_ridge)
    fit_bias = block.bias_out is not None if bias is None else bias
    return prune(block, block.activations(x), keep, method, refit_ridge, fit_bias)


def _relative_error(found_TD: Tensor, wanted_TD: Tensor) -> float:
    """Divide the length of a difference by that of what was wanted, over all tokens."""
    return float((found_TD - wanted_TD).norm() / wanted_TD.norm().clamp(min=1e-30))


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


def _hold_out(x_TD: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Split off the last tokens."""
    held_out = int(len(x_TD) * share)
    return x_TD[: len(x_TD) - held_out], x_TD[len(x_TD) - held_out :]


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
