"""Where a router's weights go beside the outputs of routed experts: inputs, shared experts.

Shapes: T tokens, D d_model, K choices per token, S shared experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.layers.dense import DenseFFN
from moezoo.routing import Routing


class Operands(NamedTuple):
    """What experts are called with: rows, and for each row some experts and their weights."""

    rows: Tensor
    indices: Tensor
    weights: Tensor


def operands_of(tokens_TD: Tensor, routing: Routing, weigh_inputs: bool) -> Operands:
    """Return the operands of routed experts.

    Args:
        tokens_TD: what they read.
        routing: of the tokens.
        weigh_inputs: whether weights multiply what an expert reads. Each choice is then a row of
            its own, ``(T K, D)``, with one expert and the weight 1.
    """
    if not weigh_inputs:
        return Operands(tokens_TD, routing.indices, routing.weights)
    weights_TK1 = routing.weights.unsqueeze(-1).to(tokens_TD.dtype)
    rows = (tokens_TD.unsqueeze(1) * weights_TK1).flatten(0, 1)
    indices = routing.indices.reshape(-1, 1)
    return Operands(rows, indices, (indices >= 0).to(routing.weights.dtype))


def outputs_of(rows: Tensor, routing: Routing, weigh_inputs: bool) -> Tensor:
    """Return the outputs ``(T, D)`` from those of the operands' rows."""
    if not weigh_inputs:
        return rows
    tokens, top_k = routing.indices.shape
    return rows.reshape(tokens, top_k, rows.shape[-1]).sum(dim=1)


def returned_tokens(tokens_TD: Tensor, routing: Routing, slots: tuple[int, int]) -> Tensor:
    """Return what identity experts add to the outputs, ``(T, D)``: weighed tokens.

    Args:
        tokens_TD: as the layer reads them.
        routing: of the tokens.
        slots: the first identity expert, and the one after the last.
    """
    others_TK = (routing.indices < slots[0]) | (routing.indices >= slots[1])
    total_T1 = routing.weights.masked_fill(others_TK, 0.0).sum(dim=-1, keepdim=True)
    # Padding may hold anything, and zero times what is not finite is no number.
    return (total_T1 * tokens_TD).masked_fill(others_TK.all(-1, keepdim=True), 0.0)


def weighed_shared(
    block: DenseFFN, tokens_TD: Tensor, weights_TS: Tensor, brute_force: bool
) -> Tensor:
    """Sum the outputs of the shared experts that lie side by side in a block, each weighed.

    Args:
        block: S experts of one width, without an output bias.
        tokens_TD: what they read.
        weights_TS: their weights.
        brute_force: apply each expert by itself.
    """
    inner_TF = block.inner(tokens_TD)
    width, weights_TS = inner_TF.shape[-1] // weights_TS.shape[-1], weights_TS.to(inner_TF.dtype)
    if not brute_force:
        weighed: Tensor = block.down_proj(inner_TF * weights_TS.repeat_interleave(width, dim=-1))
        return weighed
    parts = zip(inner_TF.split(width, -1), block.down_proj.weight.split(width, -1), strict=True)
    outputs_TDS = torch.stack([inner @ down.t() for inner, down in parts], dim=-1)
    return (outputs_TDS * weights_TS.unsqueeze(-2)).sum(dim=-1)
