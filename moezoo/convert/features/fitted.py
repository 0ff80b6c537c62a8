"""ReLU features of the input, and the matrix that follows them by least squares.

``Φ(x) = relu(G x) / √r`` with ``G ~ N(0, 1)``, as in the ReLU layers of Sehanobish et al. 2023
(arXiv:2310.13225). From the dense weights the paper begins with ``Ψ = relu(W G^T) / √r``, whose
product with Φ estimates the arc-cosine kernel of x and W, not the activation of ``W x``, and trains
it. Here Ψ and a constant are fitted to the block's outputs on calibration tokens, gated or not, by
the explicit optimum for squared errors that the paper has for bundled networks: Ψ knows nothing of
the weights.

Shapes: T tokens, D d_model, F neurons, r features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.carve.refit import STRENGTHS, Change, Missing, fit_change
from moezoo.convert.features.universal import universal
from moezoo.errors import InputError, check_int
from moezoo_kernels.linear import linear

_JUDGED = 0.1
"""Of the tokens: on so many strengths are chosen, and on as many others errors are measured."""
_MOST_LOST = 1.1
"""What keeping first tokens exact may raise the error at all others to, over that without."""


@dataclass(frozen=True)
class FittedFeatures:
    """A block of random features, and its errors on tokens that nothing was fitted to.

    Attributes:
        block: ``up`` (r, D) is ``G / √r``, ``down`` (D, r) is Ψ, ``bias_in`` is zero.
        errors: of fewer features and of all, by their number: ``|y - ŷ| / |y|`` of the outputs.
        universal: the same of :mod:`~moezoo.convert.features.universal`, as many of them.
        linear: the same of the best linear map of the input, which takes D features.
        exact: whether first tokens are kept.
    """

    block: Block
    errors: dict[int, float]
    universal: dict[int, float]
    linear: float
    exact: bool


def equal_neurons(features: int, gated: bool) -> int:
    """Return how many neurons of a dense block take as much work as features."""
    return max(round(features * (2 / 3 if gated else 1)), 1)


def counts(features: int) -> tuple[int, ...]:
    """Return the numbers of features at which errors are measured, the last of them all."""
    return tuple(dict.fromkeys(max(features >> halvings, 2) for halvings in (3, 2, 1, 0)))


@torch.no_grad()
def fit_features(
    block: Block,
    x_TD: Tensor,
    features: int,
    first_T: Tensor,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    strengths: Sequence[float] = STRENGTHS,
) -> FittedFeatures:
    """Fit random features to a block.

    Args:
        block: the dense block.
        x_TD: its inputs on calibration tokens.
        features: r.
        first_T: true at the first token of each text, which is apart from all others: it may be a
            thousand times larger. It is kept exact where that costs the others little.
        seed: of G.
        dtype: that G is rounded to before the fit.
        strengths: of the ridge, of which the best is taken.

    Raises:
        InputError: too few tokens, or the least squares have no solution.
    """
    check_int("features", features, minimum=2)
    ordinary = (~first_T).nonzero().flatten()
    judged = int(len(ordinary) * _JUDGED)
    if not judged:
        raise InputError(
            f"calibration_tokens: {len(x_TD)} are too few to fit and judge features; give more"
        )
    parts = ordinary.split([len(ordinary) - 2 * judged, judged, judged])
    first = first_T.nonzero().flatten()[:1]
    fitted, chosen, held_out, exact = (
        (x_TD[tokens], block.run(x_TD[tokens])) for tokens in (*parts, first)
    )

    def fit(weight_rD: Tensor | None, keep: bool) -> tuple[Change, float, float]:
        """Return the fit, and its errors where strengths are chosen and where nothing is."""

        def missing(sample: tuple[Tensor, Tensor]) -> Missing:
            x, y = sample
            return Missing(x if weight_rD is None else linear(x, weight_rD).relu(), y)

        kept = missing(exact) if keep else None
        change = fit_change(iter([missing(fitted)]), strengths, True, missing(chosen), kept)
        near, far = (
            missing(sample).error(change.weight, change.constant) / float(sample[1].norm())
            for sample in (chosen, held_out)
        )
        return change, near, far

    generator = torch.Generator().manual_seed(seed)
    drawn_rD = torch.randn(features, block.d_model, generator=generator)
    weight_rD = (drawn_rD * features**-0.5).to(dtype).to(x_TD)
    change, near, far = fit(weight_rD, False)
    keeping = fit(weight_rD, True) if len(first) else None
    keep = keeping is not None and keeping[1] <= _MOST_LOST * near
    if keep and keeping is not None:
        change, _, far = keeping
    errors = {count: fit(weight_rD[:count], keep)[2] for count in counts(features)[:-1]}
    drawn, (held_out_x, wanted) = universal(block, fitted[0], features, seed), held_out
    unbiased = {
        count: float((drawn.first(count // 2).run(block, held_out_x) - wanted).norm())
        / float(wanted.norm())
        for count in counts(features)
    }
    made = Block(
        None,
        weight_rD,
        change.weight,
        torch.relu,
        weight_rD.new_zeros(features),
        change.constant,
    )
    return FittedFeatures(made, {**errors, features: far}, unbiased, fit(None, keep)[2], keep)
