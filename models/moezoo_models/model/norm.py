"""Normalisation of the decoder's blocks: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) in the
roundings of several families, and LayerNorm (Ba et al. 2016, arXiv:1607.06450).

In fp32 the kinds of RMSNorm differ in their weights only; in lower precision also in where they
round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """The common part of all norms.

    Args:
        size: length of the normalised vectors.
        eps: added to the mean square, or to the variance.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, ``(..., size)``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show size and eps in ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class RMSNorm(Norm):
    """Scale each vector to unit root mean square, then by a learned weight.

    Statistics are taken in fp32 and the result is rounded to the input's dtype before the weight
    is applied, as Llama does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, ``(..., size)``."""
        return self.weight * _unit(x, self.eps).to(x.dtype)


class WideRMSNorm(Norm):
    """The same, rounded after the weight is applied (OLMo 2, arXiv:2501.00656)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, ``(..., size)``."""
        return (self.weight * _unit(x, self.eps)).to(x.dtype)


class OffsetRMSNorm(Norm):
    """The same with a factor of one plus the weight, which begins at zero (Gemma,
    arXiv:2403.08295).
    """

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, ``(..., size)``."""
        return (_unit(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


class LayerNorm(Norm):
    """Centre each vector and scale it to unit variance, then apply a learned weight and bias."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        super().reset_parameters()
        if hasattr(self, "bias"):
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, ``(..., size)``."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[Norm]] = {
    "rms": RMSNorm,
    "rms_wide": WideRMSNorm,
    "rms_offset": OffsetRMSNorm,
    "layer": LayerNorm,
}
"""Kinds of norms, as the configuration calls them."""


def _unit(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit root mean square, in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
