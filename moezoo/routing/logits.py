"""What is done before and after the linear map of a router: :class:`moezoo.LogitOptions`.

Shapes: T tokens, D d_model, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moezoo.routing.option_groups import LogitOptions
from moezoo_kernels.dtypes import at_least_fp32


def normed_input(hidden_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps) * g / sqrt(D)``, in fp32 or wider.

    Args:
        hidden_TD: the router's input x.
        scale_D: the learned g.
        eps: added to the mean square.
    """
    x_TD = at_least_fp32(hidden_TD)
    x_TD = x_TD * (x_TD.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x_TD * (scale_D.to(x_TD.dtype) * len(scale_D) ** -0.5)


def scaled_logits(logits_TE: Tensor, options: LogitOptions) -> Tensor:
    """Return the logits times their factor, capped.

    Args:
        logits_TE: with their bias.
        options: of the router.
    """
    if options.scale != 1.0:
        logits_TE = logits_TE * options.scale
    if options.softcap:
        logits_TE = options.softcap * (logits_TE / options.softcap).tanh()
    return logits_TE
