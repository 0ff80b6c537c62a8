"""Sparse matrices at the FLOPs of a dense block, when zeros are not computed: Sparse-IFT.

Thangarasa et al. 2023, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency" (arXiv:2303.11525, section 3). A block whose matrices keep a share 1 - s of their
weights is made larger until what is kept takes as many multiply-adds as a dense block:

- ``wide``: hidden neurons, ``1 / (1 - s)`` times as many where the width of the model is given;
- ``parallel``: each layer the sum of ``1 / (1 - s)`` non-linear ones, ``h = Σ_j f(W_j x)``; nothing
  follows the output's, which is a sum of matrices. That number has to be whole: rounded, as in
  public code, 1 / (1 - 0.6) would be 2, and two branches have 0.8 of the FLOPs;
- ``factorized``: each matrix a product of two sparse ones;
- ``doped``: each matrix the sum of a sparse one and a product of low rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

import moezoo
from moezoo.errors import InputError, check_choice
from moezoo.feed_forward import FeedForward
from moezoo.matrices import Doped, Factorized, Parallel, Pruned
from moezoo_train.experiments.compare.width import Match, match_flops

RULES = ("wide", "parallel", "factorized", "doped")
_FORMS = {"parallel": Parallel, "factorized": Factorized, "doped": Doped}


def kept_flops(layer: FeedForward) -> int:
    """Return forward FLOPs per token of the weights that count; masks count at their sparsest.

    Args:
        layer: a dense block; where its matrices are plain, that is what its ``cost()`` says.
    """
    biases = sum(p.numel() for name, p in layer.named_parameters() if name.endswith("bias"))
    return 2 * (layer.cost().active_parameters - biases)


def match_kept_flops(
    rule: str,
    method: moezoo.Method,
    d_model: int,
    target: int,
    *,
    arguments: Mapping[str, Any],
    tolerance: float = 0.05,
) -> Match:
    """Choose a sparse block's width so that its weights that count have the FLOPs of another layer.

    Args:
        rule: one of :data:`RULES`.
        method: of the zoo: a dense block with matrices.
        d_model: width of the residual stream.
        target: forward FLOPs per token to meet.
        arguments: of the layer, beside the method's.
        tolerance: relative difference from the target that is accepted.

    Raises:
        InputError: the rule does not go with the method, or no width comes near enough.
    """
    check_choice("sparse_ift", rule, RULES)
    _check_sparse(method, d_model, arguments)
    whole = dict(arguments)
    pruned = _pruned(rule, method, d_model, arguments) if rule in _FORMS else {}
    if rule == "parallel":
        return _parallel(method, d_model, target, whole, pruned, tolerance)
    if rule in _FORMS:
        whole["matrices"] = _FORMS[rule](**pruned)
    return match_flops(
        method, d_model, target, arguments=whole, tolerance=tolerance, count=kept_flops
    )


def _parallel(
    method: moezoo.Method,
    d_model: int,
    target: int,
    arguments: dict[str, Any],
    pruned: dict[str, Any],
    tolerance: float,
) -> Match:
    """Take the dense width that meets the target, as many times as there are branches."""
    sparsity = pruned["sparsity"]
    exact = 1.0 / (1.0 - sparsity)
    branches = round(exact)
    if abs(branches - exact) > 1e-3 * exact:
        raise InputError(
            f"sparse_ift: parallel wants 1 / (1 - sparsity) whole, and with {sparsity:g} it is "
            f"{exact:.3g}; give e.g. 0.5 or 0.75, or wide"
        )
    if "d_ff" in arguments:
        raise InputError("arguments: d_ff is solved for; leave it out")
    dense = {**arguments, "matrices": None}
    width = match_flops(method, d_model, target, arguments=dense, tolerance=tolerance)
    arguments["d_ff"] = branches * width.arguments["d_ff"]
    arguments["matrices"] = Parallel(**pruned)
    flops = kept_flops(_build(method, d_model, arguments))
    if abs(flops / target - 1) > tolerance:
        raise InputError(
            f"sparse_ift: {branches} branches have {flops / target:.3g} times the baseline's "
            "FLOPs; raise tolerance, or give wide"
        )
    return Match(arguments, "d_ff", flops, flops / target)


def _check_sparse(method: moezoo.Method, d_model: int, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` unless some of a block's weights do not count in the end."""
    layer = _build(method, d_model, arguments)
    dense = isinstance(layer, moezoo.DenseFFN) and layer.matrices is not None
    cost = layer.cost()
    if not dense or cost.active_parameters == cost.total_parameters:
        raise InputError(
            "sparse_ift: the method has no sparse matrices; name one that has, e.g. rigl or spdf"
        )


def _pruned(
    rule: str, method: moezoo.Method, d_model: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a block's pruned matrices, without their kind."""
    layer: Any = _build(method, d_model, arguments)
    if type(layer.matrices) is not Pruned:
        raise InputError(
            f"sparse_ift: {rule} is of matrices of kind pruned; name a method that has them, e.g. "
            "rigl or spdf"
        )
    options = asdict(layer.matrices)
    del options["kind"]
    return options


def _build(method: moezoo.Method, d_model: int, arguments: Mapping[str, Any]) -> FeedForward:
    try:
        with torch.device("meta"):
            return method.build(d_model, **arguments)
    except InputError as error:
        raise InputError(f"arguments: {error}") from error
