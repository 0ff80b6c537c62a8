"""The formula of ``grouped_mlp`` in plain differentiable torch: slow, and right in any dtype.

Shapes: T tokens, K choices per token, D width, E experts, F hidden width, I = 2 F if gated else F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, activate


def grouped_mlp(
    x: Tensor,  # (T, D)
    w_in: Tensor,  # (E, I, D)
    w_out: Tensor,  # (E, D, F)
    indices: Tensor,  # (T, K)
    weights: Tensor,  # (T, K)
    *,
    activation: str = "silu",
    gated: bool = True,
    bias_in: Tensor | None = None,  # (E, I)
    bias_out: Tensor | None = None,  # (E, D)
    max_assignments: int | None = None,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Loop over the experts, each on the tokens that chose it; see the package's ``grouped_mlp``.

    Autograd sees every step, so gradients (and gradients of gradients) follow without a formula.
    ``max_assignments`` changes nothing, as there is no buffer to bound.
    """
    accumulation = torch.promote_types(x.dtype, torch.float32)
    output = torch.zeros(x.shape, dtype=accumulation, device=x.device)
    for e in range(w_in.shape[0]):
        tokens, slots = (indices == e).nonzero(as_tuple=True)
        inner = F.linear(x[tokens], w_in[e], None if bias_in is None else bias_in[e])
        hidden = activate(inner, activation, gated, glu, interleaved)
        answer = F.linear(hidden, w_out[e], None if bias_out is None else bias_out[e])
        weighted = answer * weights[tokens, slots].unsqueeze(-1)
        output = output.index_add(0, tokens, weighted.to(accumulation))
    return output.to(x.dtype)
