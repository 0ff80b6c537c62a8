"""The error of a block's output by how much of it is kept, measured on calibration tokens.

Shapes: T tokens, D d_model, F neurons, N shares of the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.select.calibrate import threshold
from moezoo.convert.select.keys import Keys, token_weights
from moezoo.selection import kept, passes
from moezoo_kernels.linear import linear

GRID = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.15)
"""The shares at which errors are measured, and which :func:`allocate` chooses among."""


class Curves(NamedTuple):
    """Mean squared errors of the output, relative by token: ``mean_t w_t ‖δy_t‖²``, fp64.

    The weights are :func:`moezoo.convert.select.keys.token_weights`.

    Attributes:
        input: ``(N,)``, by the share of inputs that W_gate multiplies.
        up_input: ``(N,)``, by that of W_up.
        neurons: ``(N, N)``, by the share of gates, and of hidden values, of all neurons; infinite
            where more hidden values would be kept than gates.
    """

    input: Tensor
    up_input: Tensor
    neurons: Tensor


def error_curves(block: Block, x_TD: Tensor, keys: Keys) -> Curves:
    """Measure the error of each choice alone; those of several add up, but for neurons.

    A neuron that its gate drops is one whose hidden value is small: both are measured together. As
    the dropped values of a token are nearly independent, their error is the sum of
    ``h_i² ‖W_down[:, i]‖²``, times a factor that one exact product gives.

    Args:
        block: a gated block, in fp32.
        x_TD: inputs, without the first token of each document.
        keys: what values count for.
    """
    assert block.gate is not None
    pre_TF, up_TF = linear(x_TD, block.gate), linear(x_TD, block.up)
    gate_TF = block.act(pre_TF)
    hidden_TF = gate_TF * up_TF
    weight_T = token_weights(linear(hidden_TF, block.down))

    def error(change_TF: Tensor) -> float:
        return output_error(linear(change_TF, block.down), weight_T)

    by_input, by_up = [0.0], [0.0]
    for share in GRID[1:]:
        read_TD = kept(x_TD, passes(x_TD, threshold(x_TD, keys.input, share)))
        by_input.append(error((block.act(linear(read_TD, block.gate)) - gate_TF).mul_(up_TF)))
        read_TD = kept(x_TD, passes(x_TD, threshold(x_TD, keys.up_input, share)))
        by_up.append(error((linear(read_TD, block.up) - up_TF).mul_(gate_TF)))
    return Curves(
        torch.tensor(by_input, dtype=torch.float64),
        torch.tensor(by_up, dtype=torch.float64),
        _neurons(block, keys, gate_TF[::2], hidden_TF[::2], weight_T[::2]),
    )


def output_error(change_TD: Tensor, weight_T: Tensor) -> float:
    """Return ``mean_t w_t ‖δy_t‖²``."""
    return float((change_TD.square().sum(dim=-1) * weight_T).double().mean())


def _neurons(
    block: Block,
    keys: Keys,
    gate_TF: Tensor,
    hidden_TF: Tensor,
    weight_T: Tensor,
) -> Tensor:
    square_TF = (hidden_TF * block.down.norm(dim=0)).square() * weight_T.unsqueeze(-1)
    tokens = len(hidden_TF)
    found = torch.full((len(GRID), len(GRID)), torch.inf, dtype=torch.float64)
    found[0, 0] = 0.0
    total = float(square_TF.double().sum()) / tokens
    for g, gates in enumerate(GRID):
        by_gate_TF = passes(gate_TF, threshold(gate_TF, keys.gate, gates))
        rest_TF = kept(hidden_TF, by_gate_TF)
        for h in range(g, len(GRID)):
            mask_TF = by_gate_TF
            if h > g:
                limit = threshold(rest_TF, keys.hidden, GRID[h])
                mask_TF = by_gate_TF & passes(rest_TF, limit)
            found[g, h] = total - float(kept(square_TF, mask_TF).double().sum()) / tokens
    half = GRID.index(0.5)
    dropped = ~passes(hidden_TF, threshold(hidden_TF, keys.hidden, 0.5))
    exact = output_error(linear(kept(hidden_TF, dropped), block.down), weight_T)
    return found.clamp(min=0.0) * (exact / max(float(found[0, half]), 1e-30))
