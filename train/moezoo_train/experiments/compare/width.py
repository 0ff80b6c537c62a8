"""Equal active FLOPs: a layer's width, solved from its cost formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import moezoo
from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward

WIDTHS: dict[type[FeedForward], str] = {
    moezoo.DenseFFN: "d_ff",
    moezoo.SparseMoE: "d_expert",
    moezoo.SigmaMoE: "d_expert",
    moezoo.CarvedMoE: "d_expert",
    moezoo.HashLayer: "d_expert",
    moezoo.PEER: "top_k",
    moezoo.ProductKeyMemory: "num_heads",
    moezoo.MemoryPlus: "v_dim",
    moezoo.FastFeedForward: "d_leaf",
    moezoo.UltraFastFFF: "num_trees",
    moezoo.TopKFFN: "d_ff",
    moezoo.SelectiveFFN: "d_ff",
    moezoo.Finedeep: "d_ff",
    moezoo.STEM: "d_ff",
    moezoo.MoLE: "d_ff",
    moezoo.Engram: "d_ff",
    moezoo.L3: "d_up",
    moezoo.PerLayerEmbedding: "d_row",
}
"""The argument that is solved for unless a row names another: it sets the active width."""

_LARGEST = 1 << 20
_LARGEST_STEP = 64


@dataclass(frozen=True)
class Match:
    """A layer whose FLOPs match.

    Attributes:
        arguments: of the layer, the width included.
        argument: which argument is the width; None where the layer was left as it is.
        flops: forward FLOPs of the layer per token, by its cost formula.
        ratio: those over the target.
    """

    arguments: dict[str, Any]
    argument: str | None
    flops: int
    ratio: float


def active_flops(layer: FeedForward) -> int:
    """Return forward FLOPs per token, as computed."""
    return layer.cost().flops_per_token


def match_flops(
    method: moezoo.Method,
    d_model: int,
    target: int,
    *,
    arguments: Mapping[str, Any],
    width: str | None = None,
    tolerance: float = 0.05,
    count: Callable[[FeedForward], int] = active_flops,
) -> Match:
    """Choose a method's width so that its active FLOPs per token are those of another layer.

    Args:
        method: the method.
        d_model: width of the residual stream.
        target: forward FLOPs per token to meet.
        arguments: of the layer, beside the method's.
        width: the argument to solve for; ``"none"`` to leave the layer as it is; default: that of
            the layer in :data:`WIDTHS`.
        tolerance: relative difference from the target that is accepted.
        count: forward FLOPs per token of a layer.

    Raises:
        InputError: the layer refuses its arguments, or no width comes near enough.
    """
    if width == "none":
        flops = _flops(method, d_model, arguments, count)
        return Match(dict(arguments), None, flops, flops / target)
    width = width or WIDTHS.get(method.layer)
    if width is None:
        raise InputError(
            f"width: it is not known which argument of {method.layer.__name__} to solve for; name "
            "one, or none to take it as it is"
        )
    if width in arguments:
        raise InputError(f"arguments: {width} is solved for; leave it out, or set width: none")

    def flops_at(size: int) -> int | None:
        try:
            return _flops(method, d_model, {**arguments, width: size}, count)
        except InputError:
            return None  # too large, or no multiple of what it has to be

    step = next((s for s in range(1, _LARGEST_STEP + 1) if flops_at(s) is not None), None)
    if step is None:
        _flops(method, d_model, {**arguments, width: 1}, count)  # raises, and says why
    assert step is not None
    below = _largest_below(flops_at, target, step)
    tried = {size: flops_at(size) for size in (below, below + step)}
    found = {size: flops for size, flops in tried.items() if flops is not None}
    best = min(found, key=lambda size: abs(found[size] - target))
    ratio = found[best] / target
    if abs(ratio - 1) > tolerance:
        raise InputError(
            f"width: the nearest {width} is {best}, at {ratio:.3g} times the baseline's FLOPs; "
            "change the other arguments, name another width, raise tolerance, or set width: none"
        )
    return Match({**arguments, width: best}, width, found[best], ratio)


def _flops(
    method: moezoo.Method,
    d_model: int,
    arguments: Mapping[str, Any],
    count: Callable[[FeedForward], int],
) -> int:
    try:
        with torch.device("meta"):  # formulas need shapes only
            layer = method.build(d_model, **arguments)
    except InputError as error:
        raise InputError(f"arguments: {error}") from error
    return count(layer)


def _largest_below(flops_at: Callable[[int], int | None], target: int, step: int) -> int:
    """Find the largest valid multiple of ``step`` that stays within the target, at least one."""

    def fits(size: int) -> bool:
        flops = flops_at(size)
        return flops is not None and flops <= target

    low, high = step, 2 * step
    while fits(high) and high < _LARGEST:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
