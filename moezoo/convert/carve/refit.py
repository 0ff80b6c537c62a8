"""The refit of ``down``: what is left out is made up for, as far as what is left can.

Shapes: T tokens, D d_model, F neurons, N routed experts, k tokens that are kept exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.least_squares import Moments

STRENGTHS = (0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
"""Those that are tried where held-out tokens choose."""
_CHUNK = 4096
_ALIKE = 1e-6
"""Directions that exact tokens do not differ in, over the one that they share most."""
_MOST_MOVED = 0.25
"""Of the squares of what is missing at all other tokens: what exact ones may cost them."""


@dataclass(frozen=True)
class Missing:
    """What counts at some tokens, and what is missing there.

    Attributes:
        counted: ``(T, F)`` activations that count, zero where their expert is not chosen.
        residual: ``(T, D)``, the wanted output less that of the dense ``down`` on ``counted``.
    """

    counted: Tensor
    residual: Tensor

    def error(self, change_DF: Tensor, constant_D: Tensor | None) -> float:
        """Return the length of what is still missing after a change."""
        left = self.residual - self.counted @ change_DF.t()
        return float((left if constant_D is None else left - constant_D).norm())


def missing(
    hidden_TF: Tensor, scale_TN: Tensor, labels_F: Tensor, down_DF: Tensor, wanted_TD: Tensor
) -> Iterator[Missing]:
    """Yield what counts and what is missing, of some tokens at a time.

    Args:
        hidden_TF: all activations.
        scale_TN: what each expert's output is multiplied with at each token; 0 if not chosen.
        labels_F: each neuron's expert; -1 for the shared one.
        down_DF: the dense block's.
        wanted_TD: the output that is wanted, without a constant that stays.
    """
    everywhere = scale_TN.new_ones(len(scale_TN), 1)
    scale_TE = torch.cat([scale_TN, everywhere], dim=1)  # label -1 is the last column
    pieces = (hidden_TF.split(_CHUNK), scale_TE.split(_CHUNK), wanted_TD.split(_CHUNK))
    for hidden, scale, wanted in zip(*pieces, strict=True):
        counted = hidden * scale[:, labels_F]
        yield Missing(counted, wanted - counted @ down_DF.t())


def whole(parts: Iterator[Missing]) -> Missing:
    """Join the pieces."""
    found = list(parts)
    return Missing(
        torch.cat([part.counted for part in found]), torch.cat([part.residual for part in found])
    )


@dataclass(frozen=True)
class Change:
    """A change of ``down``.

    Attributes:
        weight: ``(D, F)``, to be added.
        constant: ``(D,)``, to be added to the output; None for none.
        strength: of the ridge.
    """

    weight: Tensor
    constant: Tensor | None
    strength: float


def fit_change(
    fitted: Iterator[Missing],
    strengths: Sequence[float],
    bias: bool,
    held_out: Missing | None = None,
    exact: Missing | None = None,
) -> Change:
    """Fit ``R = argmin ||residual - counted R^T||² + λ ||R||²``.

    Where nothing is left out there is no residual, and R is zero.

    Args:
        fitted: the tokens that R is fitted to.
        strengths: λ over the mean square of ``counted``, or where there are several, of each of
            its columns by itself. From the largest on they are tried while it gets better on
            ``held_out``.
        bias: fit a constant too, for activations whose mean is not zero.
        held_out: tokens to choose the strength on; not read if there is only one.
        exact: tokens at which nothing is missing afterwards. Of all changes that see to it, that is
            taken which moves the outputs at the other tokens least; where these would lose more by
            it than a quarter of what they miss (squared), less is made up for.
    """
    several = held_out is not None and len(strengths) > 1
    moments = Moments.of(((part.counted, part.residual) for part in fitted), bias, several)
    best: tuple[float, Change] | None = None
    for strength in sorted(strengths, reverse=True):
        weight_DF, constant_D = moments.solve(strength)
        if exact is not None and len(exact.counted):
            weight_DF = weight_DF + _to_be_exact(moments, strength, weight_DF, constant_D, exact)
        change = Change(weight_DF, constant_D, strength)
        if held_out is None or not several:
            return change
        error = held_out.error(weight_DF, constant_D)
        if best is not None and error >= best[0]:
            break  # each smaller one fits the noise more
        best = (error, change)
    assert best is not None
    return best[1]


def _to_be_exact(
    moments: Moments, strength: float, weight_DF: Tensor, constant_D: Tensor | None, exact: Missing
) -> Tensor:
    """Return the change ``(D, F)`` after which nothing is missing at the exact tokens.

    With A the ridge's matrix, K what counts there and M what is still missing, it is ``A^-1 K^T
    (K A^-1 K^T + μ I)^-1 M``. μ is 0, but for directions that tokens have in common. Where hardly
    anything counts, no change could make up for what earlier layers are off by without ruining all
    other outputs: μ is then the first that leaves these as good as they were.
    """
    left_kD = exact.residual - exact.counted @ weight_DF.t()
    if constant_D is not None:
        left_kD = left_kD - constant_D
    whitened_Fk = moments.whiten(exact.counted, strength)
    gram_kk = (exact.counted.double() @ whitened_Fk.double()).cpu()
    values_k, vectors_kk = torch.linalg.eigh((gram_kk + gram_kk.t()) / 2)
    most = float(values_k[-1])
    left_kD = vectors_kk.t() @ left_kD.double().cpu()
    square_k = left_kD.square().sum(1)
    inverse_k = torch.where(values_k > _ALIKE * most, 1 / values_k, 0.0)
    damping = _ALIKE * most
    allowed = _MOST_MOVED * moments.square
    # Σ s_i / (s_i + μ)² |m_i|² bounds the squares of what the change adds to all fitted outputs.
    while damping < most / _ALIKE and _moved(values_k, inverse_k, square_k) > allowed:
        inverse_k = 1 / (values_k.clamp(min=0) + damping)
        damping *= 4
    change_kD = vectors_kk @ (inverse_k[:, None] * left_kD)
    return (whitened_Fk @ change_kD.to(whitened_Fk)).t()


def _moved(values_k: Tensor, inverse_k: Tensor, square_k: Tensor) -> float:
    return float((values_k * inverse_k.square() * square_k).sum())
