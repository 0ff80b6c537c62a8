"""Two of every four output gradients, drawn so that the weights' gradient has no bias.

``dW = Yᵀ X`` sums over tokens. Of every four tokens' gradients of an output two are kept, number i
with probability ``π_i = min(1, c |y_i|)``, c such that ``Σ π = 2``, and as ``y_i / π_i``. No other
unbiased estimate with two of four has a smaller variance (Chmiel et al. 2022, arXiv:2203.10991;
used by Hu et al. 2024, arXiv:2404.01847). Which two is *systematic* sampling: π is laid along a
line, and points 1 apart, from a uniform random start, hit exactly two.

Shapes: T tokens, G = T // 4 groups, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.linear import multiply


def uniform_for(x: Tensor, outputs: int) -> Tensor:
    """Draw the starts of all groups, ``(G, O)``, in the forward pass, which may be recomputed."""
    tokens = x.numel() // x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.rand(tokens // 4, outputs, dtype=dtype, device=x.device)


def inclusion(values_G4O: Tensor) -> Tensor:
    """Return the probabilities π of four values, ``(G, 4, O)``; zeros are never included."""
    size = values_G4O.abs()
    total = size.sum(dim=1, keepdim=True)
    most, place = size.max(dim=1, keepdim=True)
    # The largest may be certain; the others, which then have one place, cannot be.
    certain = 2 * most > total
    tiny = torch.finfo(size.dtype).tiny
    rest = torch.where(certain, total - most, total / 2)
    shares = (size / rest.clamp(min=tiny)).clamp(max=1.0)
    first = torch.zeros_like(size, dtype=torch.bool).scatter_(1, place, True)
    return torch.where(certain & first, torch.ones_like(size), shares)


def two_of_four(values_TO: Tensor, uniform_GO: Tensor) -> Tensor:
    """Return an unbiased estimate with two values of each four tokens; a last few stay as are."""
    groups, outputs = uniform_GO.shape
    wide = values_TO[: 4 * groups].to(uniform_GO.dtype).reshape(groups, 4, outputs)
    share = inclusion(wide)
    ends = share.cumsum(dim=1)
    ends[:, 3] = ends[:, 3].round()  # 2, or as many as are not zero
    points = (ends - uniform_GO.unsqueeze(1)).ceil()
    hit = points.diff(dim=1, prepend=torch.zeros_like(points[:, :1])) > 0
    kept = torch.where(hit, wide / share.clamp(min=torch.finfo(share.dtype).tiny), 0.0)
    estimate = kept.reshape(4 * groups, outputs).to(values_TO.dtype)
    return torch.cat([estimate, values_TO[4 * groups :]])


class _SampledLinear(torch.autograd.Function):
    """A product whose weights' gradient is made of sampled output gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, uniform_GO: Tensor, exact: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI, uniform_GO, exact)
        return multiply(x_TI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TI, weight_OI, uniform_GO, exact = ctx.saved_tensors
        (gradient_TO,) = gradients
        sampled_TO = torch.where(exact, gradient_TO, two_of_four(gradient_TO, uniform_GO))
        of_weight_OI = multiply(sampled_TO.t(), x_TI.t())
        return multiply(gradient_TO, weight_OI.t()), of_weight_OI, None, None


def sampled_linear(x: Tensor, weight_OI: Tensor, exact: Tensor) -> Tensor:
    """Multiply, such that in the backward pass the weights' gradient is sampled.

    Args:
        x: ``(..., I)``.
        weight_OI: the matrix.
        exact: a scalar bool; the gradient is exact where it is true.
    """
    uniform_GO = uniform_for(x, len(weight_OI))
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
    output = _SampledLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, uniform_GO, exact)
    return output.reshape(*x.shape[:-1], len(weight_OI))


def reference_linear(x: Tensor, weight_OI: Tensor, exact: Tensor) -> Tensor:
    """Do the same row by row, with the sampling as a hook of a value that adds nothing."""
    uniform_GO = uniform_for(x, len(weight_OI))
    x_TI = x.reshape(-1, x.shape[-1])
    plain = torch.stack([(x_TI * row).sum(dim=-1) for row in weight_OI.detach()], dim=-1)
    weights_only = F.linear(x_TI.detach(), weight_OI)
    if weights_only.requires_grad and not exact:
        weights_only.register_hook(lambda g: two_of_four(g, uniform_GO))
    output = plain + (weights_only - weights_only.detach())
    return output.reshape(*x.shape[:-1], len(weight_OI))
