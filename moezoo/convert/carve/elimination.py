"""Which neurons the others make up for best: leaving out one after the other, refit included.

With G the Gram matrix of activations, a refit of ``down`` after neuron i is left out adds
``||down_i||² / (G^-1)_ii`` to the squared error of outputs (Hassibi and Stork 1993, optimal brain
surgeon; for whole neurons ZipLM, Kurtić et al. 2023, arXiv:2302.04089, eq. 2). A large activation
that others go along with costs nothing.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRENGTH = 0.03
_STEPS = 96
"""Neurons are left out in so many steps, if all are: those of a step are judged together."""


def elimination_order(hidden_TF: Tensor, down_DF: Tensor, count: int) -> Tensor:
    """Sort neurons, those that are missed most first.

    Args:
        hidden_TF: activations on calibration tokens.
        down_DF: the dense block's output projection.
        count: how many to leave out, the last of them first; the rest goes by what leaving it out
            next would cost.

    Returns:
        ``(F,)`` int64.
    """
    width = hidden_TF.shape[1]
    gram_FF = hidden_TF.new_zeros(width, width, dtype=torch.float64)
    for part in hidden_TF.split(4096):
        gram_FF += part.t() @ part
    inverse_FF = _inverse(gram_FF)
    weight_DF = down_DF.double()
    alive_F = torch.ones(width, dtype=torch.bool, device=hidden_TF.device)
    left_out: list[Tensor] = []
    step = max(width // _STEPS, 1)
    for start in range(0, count, step):
        cost_F = _costs(weight_DF, inverse_FF, alive_F)
        worst = cost_F.sort(stable=True).indices[: min(step, count - start)]
        # The Schur complement: the inverse of the Gram matrix of those that stay.
        rows_KF = torch.linalg.solve(inverse_FF[worst][:, worst], inverse_FF[worst])
        weight_DF = weight_DF - weight_DF[:, worst] @ rows_KF
        inverse_FF -= inverse_FF[:, worst] @ rows_KF
        alive_F[worst] = False
        weight_DF[:, worst] = 0.0
        inverse_FF[worst] = 0.0
        inverse_FF[:, worst] = 0.0
        left_out.append(worst)
    cost_F = _costs(weight_DF, inverse_FF, alive_F).masked_fill(~alive_F, -1.0)
    kept = cost_F.sort(descending=True, stable=True).indices[: width - count]
    return torch.cat([kept, *(each.flip(0) for each in reversed(left_out))])


def _inverse(gram_FF: Tensor) -> Tensor:
    size = gram_FF.diagonal().mean()
    if float(size) == 0.0:  # no neuron is ever active: all are alike
        return torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    gram_FF.diagonal().add_(_STRENGTH * size)
    return torch.linalg.inv(gram_FF)


def _costs(weight_DF: Tensor, inverse_FF: Tensor, alive_F: Tensor) -> Tensor:
    """Return what leaving out each neuron next adds to the squared error; infinite if it is out."""
    cost_F = weight_DF.square().sum(dim=0) / inverse_FF.diagonal().clamp(min=1e-300)
    return cost_F.masked_fill(~alive_F, torch.inf)
