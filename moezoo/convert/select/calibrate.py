"""Thresholds of one block, such that tokens keep given shares.

Shapes: T tokens, D d_model, F neurons, C channels of either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.select.keys import Keys
from moezoo.selection import Shares, kept, passes
from moezoo_kernels.linear import linear

_NUMBERS = 1 << 21  # of which a quantile is taken: its error is below 1e-3 of the share
_CHUNK = 4096


class LayerThresholds(NamedTuple):
    """The thresholds of a gated block, as :class:`moezoo.selection.ThresholdSelector` has them.

    Attributes:
        input: ``(D,)`` fp32.
        gate: ``(F,)`` fp32.
        up_input: ``(D,)`` fp32.
        hidden: ``(F,)`` fp32.
        shares: what calibration tokens kept.
    """

    input: Tensor
    gate: Tensor
    up_input: Tensor
    hidden: Tensor
    shares: Shares

    def run(self, block: Block, x_TD: Tensor, dense_T: Tensor) -> Tensor:
        """Compute the block with what is kept, ``(T, D)``; all for the tokens marked dense."""
        parts = zip(x_TD.split(_CHUNK), dense_T.split(_CHUNK), strict=True)
        return torch.cat([self._part(block, x, dense) for x, dense in parts])

    def _part(self, block: Block, x_TD: Tensor, dense_T: Tensor) -> Tensor:
        dense_T1 = dense_T.unsqueeze(-1)
        gate_TF = _gate(block, kept(x_TD, passes(x_TD, self.input) | dense_T1))
        up_TF = linear(kept(x_TD, passes(x_TD, self.up_input) | dense_T1), block.up)
        hidden_TF = gate_TF * up_TF
        mask_TF = passes(gate_TF, self.gate) & passes(hidden_TF, self.hidden)
        return linear(kept(hidden_TF, mask_TF | dense_T1), block.down, block.bias_out)


def threshold(values_TC: Tensor, key_C: Tensor, share: float) -> Tensor:
    """Return thresholds ``(C,)`` fp32 that the given share of all values exceeds in magnitude.

    They are ``τ / key``, τ the quantile of ``|v| key`` over tokens and channels. Magnitudes are
    what is ranked: a symmetric distribution is not assumed, which at a half would drop three
    quarters of a squared ReLU's values.

    Args:
        values_TC: calibration values, in the dtype in which they will be compared.
        key_C: factors, at least zero; a value that counts for nothing is always dropped.
        share: to keep; 1 gives zeros.
    """
    if share >= 1:
        return torch.zeros_like(key_C, dtype=torch.float32)
    step = max(values_TC.numel() // _NUMBERS, 1)
    scores = (values_TC[::step].float().abs() * key_C).flatten()
    rank = min(max(round((1 - share) * len(scores)), 1), len(scores))
    limit = scores.kthvalue(rank).values
    most = torch.finfo(torch.float32).max
    return (limit / key_C.float()).nan_to_num(nan=0.0, posinf=most)


def calibrate(
    block: Block,
    x_TD: Tensor,
    keys: Keys,
    budget: Shares,
    dtype: torch.dtype = torch.float32,
) -> LayerThresholds:
    """Return the thresholds with which tokens keep what a budget says.

    Each is found on values that the ones before it have changed, as they are when it is applied.

    Args:
        block: a gated block, in fp32.
        x_TD: its inputs on calibration tokens, without the first of each document, whose values
            would fill a quantile alone.
        keys: what values count for.
        budget: shares to keep; of hidden values, those that the gate dropped are dropped too.
        dtype: in which the block will be computed; values are rounded to it.
    """

    def rounded(values: Tensor) -> Tensor:
        return values.to(dtype).to(values.dtype)

    x_TD = rounded(x_TD)
    by_input = threshold(x_TD, keys.input, budget.input)
    by_up_input = threshold(x_TD, keys.up_input, budget.up_input)
    input_TD, up_input_TD = passes(x_TD, by_input), passes(x_TD, by_up_input)
    gate_TF = rounded(_gate(block, kept(x_TD, input_TD)))
    by_gate = threshold(gate_TF, keys.gate, budget.gate)
    mask_TF = passes(gate_TF, by_gate)
    hidden_TF = rounded(gate_TF.mul_(linear(kept(x_TD, up_input_TD), block.up)))
    hidden_TF = kept(hidden_TF, mask_TF)
    by_hidden = torch.zeros_like(keys.hidden, dtype=torch.float32)
    if budget.hidden < budget.gate:
        by_hidden = threshold(hidden_TF, keys.hidden, budget.hidden)
    last_TF = mask_TF & passes(hidden_TF, by_hidden)
    shares = (float(m.float().mean()) for m in (input_TD, mask_TF, up_input_TD, last_TF))
    return LayerThresholds(by_input, by_gate, by_up_input, by_hidden, Shares(*shares))


def _gate(block: Block, x_TD: Tensor) -> Tensor:
    assert block.gate is not None
    return block.act(linear(x_TD, block.gate))
