"""Universal random features: a dense block as ``Ψ Φ(x)``, without bias, from its weights alone.

The activation is written as a Fourier series (Sehanobish et al. 2023, arXiv:2310.13225, section 3),

    f(z) = Σ_k Re(c_k exp(iω_k z)),  ω_k = πk / P,

and each term as a mean over ``g ~ N(0, I)``, in which x and w meet in one product only: for
``s β = ω``,

    exp(iω w·x) = E[exp(i s g·x + s²|x|²/2) · exp(β g·w - β²|w|²/2)].

The factors of x are the features, in pairs of a cosine and a sine; those of w, times ``c_k``, are
what multiplies them. The paper takes ``s = β = (iω)^½``; a real s bounds the features of inputs of
equal length, which norms see to. Its derivative by w in the direction of u is what a gated linear
unit needs (ours; the paper has no gates), with the same features:

    (u·x) exp(iω w·x) = E[exp(i s g·x + s²|x|²/2) · exp(β g·w - β²|w|²/2) (g·u - β w·u) / (i s)].

The mean square of a term is ``exp(2ω|w||x|)`` for the s that makes it least, whatever ``w·x`` is.
Where lengths multiply to much more than one, no number of features that a block could hold makes
the error small.

Shapes: T tokens, D d_model, F neurons, M pairs of features, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.errors import check_int
from moezoo_kernels.linear import linear

_POINTS = 2048
_MOST_TERMS = 256
_NEURONS = 512
_TOKENS = 1024


@dataclass(frozen=True)
class Series:
    """A function of one number as a sum of waves, fp64.

    Attributes:
        frequency: ``(K,)`` ω_k, from 0.
        coefficient: ``(K,)`` complex c_k.
    """

    frequency: Tensor
    coefficient: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return ``Σ_k Re(c_k exp(iω_k z))``, of the shape of ``z``."""
        waves = torch.exp(1j * self.frequency * z.double()[..., None])
        return (waves * self.coefficient).real.sum(dim=-1)


def fourier_series(
    act: Callable[[Tensor], Tensor], reach: float, tolerance: float = 1e-3
) -> Series:
    """Return a short series that equals an activation wherever ``|z| ≤ reach``, within a tolerance.

    Beyond, up to its period of ``4 reach``, it is whatever it is: so frequencies stay low, by which
    the error of random features grows exponentially. Terms are found by least squares, as many as
    it takes; functions with a kink need many.

    Args:
        act: the activation, element by element.
        reach: Z.
        tolerance: largest error, over the largest value within Z.
    """
    z = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    wanted = act(z)
    bound = tolerance * float(wanted.abs().max())
    terms = 1
    while True:
        frequency = torch.arange(terms + 1, dtype=torch.float64) * (math.pi / (2.0 * reach))
        angle = z[:, None] * frequency
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        found = torch.linalg.lstsq(waves, wanted[:, None], rcond=1e-6, driver="gelsd").solution
        cosine, sine = found.squeeze(1).chunk(2)
        series = Series(frequency, torch.complex(cosine, -sine))
        if terms >= _MOST_TERMS or float((series(z) - wanted).abs().max()) <= bound:
            return series
        terms += max(terms // 4, 1)


@dataclass(frozen=True)
class UniversalFeatures:
    """Features that were drawn, fp64.

    Attributes:
        direction: ``(M, D)`` g.
        frequency: ``(M,)`` ω of the term that each pair estimates.
        coefficient: ``(M,)`` complex, that of the term over its probability and M.
        scale: ``(M,)`` s.
    """

    direction: Tensor
    frequency: Tensor
    coefficient: Tensor
    scale: Tensor

    def first(self, pairs: int) -> UniversalFeatures:
        """Return the first pairs alone, as if no more had been drawn."""
        count = len(self.direction)
        kept = (each[:pairs] for each in (self.direction, self.frequency, self.coefficient))
        direction, frequency, coefficient = kept
        coefficient = coefficient * (count / pairs)
        return UniversalFeatures(direction, frequency, coefficient, self.scale[:pairs])

    def of(self, x_TD: Tensor) -> Tensor:
        """Return the features Φ(x), ``(T, 2M)``: all cosines, then all sines."""
        x_TD = x_TD.double()
        angle_TM = (x_TD @ self.direction.t()) * self.scale
        growth_TM = torch.exp(x_TD.square().sum(dim=1, keepdim=True) * self.scale.square() / 2)
        return torch.cat([growth_TM * angle_TM.cos(), growth_TM * angle_TM.sin()], dim=1)

    def weights(self, block: Block) -> Tensor:
        """Return what multiplies the features for each neuron, ``(F, 2M)``."""
        block = block.to(torch.float64)
        rows_FD = block.up if block.gate is None else block.gate
        beta_M = self.frequency / self.scale
        drawn_FM = rows_FD @ self.direction.t()
        square_F1 = rows_FD.square().sum(dim=1, keepdim=True)
        size_FM = torch.exp(beta_M * drawn_FM - beta_M.square() * square_F1 / 2)
        term_FM = size_FM * self.coefficient
        if block.bias_in is not None:
            term_FM = term_FM * torch.exp(1j * block.bias_in[:, None] * self.frequency)
        if block.gate is not None:
            along_F1 = (block.gate * block.up).sum(dim=1, keepdim=True)
            slope_FM = block.up @ self.direction.t() - beta_M * along_F1
            term_FM = term_FM * slope_FM / (1j * self.scale)
        return torch.cat([term_FM.real, -term_FM.imag], dim=1)

    def bundle(self, block: Block) -> Tensor:
        """Return Ψ, ``(D, 2M)``: ``down`` times :meth:`weights`."""
        neurons = torch.arange(block.width, device=block.up.device).split(_NEURONS)
        bundled_DP = block.down.new_zeros(
            block.d_model, 2 * len(self.direction), dtype=torch.float64
        )
        for some in neurons:  # what multiplies the features is larger than the block
            part = block.take(some)
            bundled_DP += part.down.double() @ self.weights(part)
        return bundled_DP

    def run(self, block: Block, x_TD: Tensor) -> Tensor:
        """Estimate the block's output, ``(T, D)`` fp64."""
        output_TD = self.of(x_TD) @ self.bundle(block).t()
        return output_TD if block.bias_out is None else output_TD + block.bias_out.double()


def universal(block: Block, x_TD: Tensor, features: int, seed: int = 0) -> UniversalFeatures:
    """Draw features for a block.

    Inputs decide nothing but how far the series has to reach, and by their mean length the scale s
    and how often each term is drawn.

    Args:
        block: the dense block, plain or gated.
        x_TD: inputs.
        features: r = 2M, rounded down to pairs.
        seed: of what is drawn.
    """
    pairs = check_int("features", features, minimum=2) // 2
    x_TD, wide = x_TD.double(), block.to(torch.float64)
    rows_FD = wide.up if wide.gate is None else wide.gate
    largest = max(
        float(linear(part, rows_FD, wide.bias_in).abs().max()) for part in x_TD.split(_TOKENS)
    )
    series = fourier_series(block.act, max(largest, 1.0))
    return draw(series, pairs, _length(x_TD), _length(rows_FD), x_TD.shape[1], seed)


def draw(
    series: Series, pairs: int, inputs: float, rows: float, d_model: int, seed: int
) -> UniversalFeatures:
    """Draw pairs of features.

    Args:
        series: of the activation.
        pairs: M.
        inputs: the inputs' usual length.
        rows: that of the rows which the activation is a function of.
        d_model: D.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    # In proportion to the root of each term's mean square, by which their mean errs least.
    size = series.coefficient.abs().log() + series.frequency * (inputs * rows)
    probability = size.softmax(dim=0)
    term = torch.multinomial(probability, pairs, replacement=True, generator=generator)
    direction = torch.randn(pairs, d_model, dtype=torch.float64, generator=generator)
    coefficient = series.coefficient[term] / (probability[term] * pairs)
    frequency = series.frequency[term]
    return UniversalFeatures(direction, frequency, coefficient, scales(frequency, inputs, rows))


def scales(frequency: Tensor, inputs: float, rows: float) -> Tensor:
    """Return s, with which ``exp(s²|x|² + β²|w|²)`` is least; where ω is 0, one of order 1/|x|."""
    return (frequency * rows).clamp(min=1.0 / inputs).sqrt() / math.sqrt(inputs)


def _length(rows: Tensor) -> float:
    """Return the root mean square length of rows."""
    return max(float(rows.square().sum(dim=1).mean().sqrt()), 1e-12)


__all__ = ["Series", "UniversalFeatures", "draw", "fourier_series", "scales", "universal"]
