"""What a value counts for: the factors that turn magnitudes into estimates of the output's error.

A value v is dropped where ``|v| key`` is small, so that its threshold is ``τ / key``.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.select.budget import SelectMethod
from moezoo_kernels.linear import linear


class Keys(NamedTuple):
    """Factors on the magnitudes of what :class:`moezoo.selection.Kept` names, fp32.

    Attributes:
        input: ``(D,)``.
        gate: ``(F,)``.
        up_input: ``(D,)``.
        hidden: ``(F,)``.
    """

    input: Tensor
    gate: Tensor
    up_input: Tensor
    hidden: Tensor


def keys_of(method: SelectMethod, block: Block, x_TD: Tensor) -> Keys:
    """Return a method's factors.

    - ``cats``, ``teal``: ones (arXiv:2404.08763, arXiv:2408.14690).
    - ``chess``: ``√E[u_i²]`` on gates, of which the product's error is the mean square
      (arXiv:2409.01366, eq. 7).
    - ``wina``: the norm of the column that the value multiplies (arXiv:2505.19427, eq. 4).
    - ``mix``: the same carried on to the block's output. With ``d_i = ‖W_down[:, i]‖`` a hidden
      value counts ``d_i``, a gate ``√E[u_i²] d_i``, and an input of W_up or W_gate the norm of its
      column with row i times ``√E[g_i²] d_i`` or ``√E[(act'(z_i) u_i)²] d_i``. Tokens weigh as in
      :func:`token_weights`.

    Args:
        method: the method.
        block: a gated block, in fp32.
        x_TD: inputs on calibration tokens, without the first of each document.
    """
    gate_weight = block.gate
    assert gate_weight is not None
    ones_D, ones_F = x_TD.new_ones(block.d_model), x_TD.new_ones(block.width)
    if method in ("cats", "teal"):
        return Keys(ones_D, ones_F, ones_D, ones_F)
    down_F = block.down.norm(dim=0)
    if method == "wina":
        return Keys(gate_weight.norm(dim=0), ones_F, block.up.norm(dim=0), down_F)
    up_TF = linear(x_TD, block.up)
    up_F = up_TF.square().mean(dim=0).sqrt()
    if method == "chess":
        return Keys(ones_D, up_F, ones_D, ones_F)
    gate_TF, slope_TF = _with_slope(block, linear(x_TD, gate_weight))
    weight_T = token_weights(linear(gate_TF * up_TF, block.down))
    share_T1 = (weight_T / weight_T.sum()).unsqueeze(-1)

    def spread(values_TF: Tensor) -> Tensor:
        return (values_TF.square() * share_T1).sum(dim=0).sqrt()

    of_gate_F, of_up_F = spread(slope_TF * up_TF) * down_F, spread(gate_TF) * down_F
    return Keys(
        (gate_weight * of_gate_F.unsqueeze(-1)).norm(dim=0),
        spread(up_TF) * down_F,
        (block.up * of_up_F.unsqueeze(-1)).norm(dim=0),
        down_F,
    )


def token_weights(output_TD: Tensor) -> Tensor:
    """Return ``1 / (‖y_t‖² + median ‖y‖²)``, ``(T,)``: what an error at each token counts.

    In a few layers a few tokens, not the first one alone, have outputs a thousand times as large as
    others, and the norm of the next block divides by them. Squares that are not weighed would be
    theirs alone.
    """
    square_T = output_TD.square().sum(dim=-1)
    least = torch.finfo(square_T.dtype).tiny
    return 1 / (square_T + square_T.median()).clamp(min=least)


def _with_slope(block: Block, pre_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activation and its derivative."""
    with torch.enable_grad():
        pre_TF = pre_TF.detach().requires_grad_()
        value_TF = block.act(pre_TF)
        (slope_TF,) = torch.autograd.grad(value_TF.sum(), pre_TF)
    return value_TF.detach(), slope_TF
