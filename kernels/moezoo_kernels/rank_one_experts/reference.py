"""The formula of ``rank_one_experts`` in plain differentiable torch: right, and large.

It gathers two tensors of (assignments, D), or three with a gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels.activations import activate


def rank_one_experts(
    x: Tensor,  # (T, D)
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    indices: Tensor,  # (T, J)
    weights: Tensor,  # (T, J)
    *,
    activation: str = "gelu",
    gate: Tensor | None = None,  # (N, D)
    sparse: bool = False,
) -> Tensor:
    """Write out every assignment; see the package's ``rank_one_experts``.

    Autograd sees every step, so gradients (and gradients of gradients) follow without a formula.
    """
    tokens, slots = (indices >= 0).nonzero(as_tuple=True)
    experts = indices[tokens, slots]
    asked = x[tokens].to(u.dtype)

    def dots(table: Tensor) -> Tensor:
        rows = F.embedding(experts, table, sparse=sparse)
        return (asked * rows).sum(dim=-1, keepdim=True)

    inner = dots(u) if gate is None else torch.cat([dots(gate), dots(u)], dim=-1)
    coefficients = weights[tokens, slots].unsqueeze(-1) * activate(
        inner, activation, gate is not None
    )
    answers = coefficients * F.embedding(experts, v, sparse=sparse)
    output = torch.zeros(x.shape, dtype=answers.dtype, device=x.device)
    return output.index_add(0, tokens, answers).to(x.dtype)
