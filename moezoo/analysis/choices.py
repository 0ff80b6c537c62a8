"""The choices of each token: those behind :meth:`moezoo.FeedForward.slot_load`, unsummed.

Shapes: T tokens, K choices per token, N slots.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo.analysis.watching import Context, input_of
from moezoo.errors import InputError
from moezoo.experts.memory import KeyValueMemory
from moezoo.experts.token_table import rows_of_tokens
from moezoo.feed_forward import FeedForward, TokenContext, flatten_tokens
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import DenseFFN
from moezoo.layers.engram import Engram
from moezoo.layers.fast_feed_forward import FastFeedForward
from moezoo.layers.hash import HashLayer
from moezoo.layers.l3 import L3
from moezoo.layers.memory_layer import MemoryLayer
from moezoo.layers.mole import MoLE
from moezoo.layers.peer import PEER
from moezoo.layers.per_layer_embedding import PerLayerEmbedding
from moezoo.layers.selective_ffn import SelectiveFFN
from moezoo.layers.sigma_moe import SigmaMoE
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.layers.stem import STEM
from moezoo.layers.top_k_ffn import TopKFFN
from moezoo.layers.ultra_fast_fff import UltraFastFFF
from moezoo.routing import Routing
from moezoo_kernels import path_neurons


class SlotChoices(NamedTuple):
    """The slots that each token chose.

    Attributes:
        indices: ``(T, K)`` int64 slots, -1 where there is none, as at padding.
        weights: ``(T, K)``, not negative: what each was given, before any limit on capacity; zero
            where there is no slot.
        num_slots: N.
        kind: what the slots are, in the plural: experts, leaves, values, neurons. In trees it is
            the leaf that hard decisions reach.
    """

    indices: Tensor
    weights: Tensor
    num_slots: int
    kind: str

    def heaviest(self) -> Tensor:
        """Return the slot of each token that weighs most, ``(T,)``; the first among equals."""
        best_T1 = self.weights.argmax(dim=-1, keepdim=True)
        return self.indices.gather(-1, best_T1).squeeze(-1)


def slot_choices(layer: FeedForward, hidden: Tensor, context: Context) -> SlotChoices:
    """Return the slots each token chooses in one forward pass in evaluation mode.

    Args:
        layer: any layer of the zoo that chooses.
        hidden: ``(..., d_model)``.
        context: what a call of the layer gets by name: ``token_ids``, ``mask``, ...

    Raises:
        InputError: the layer is of a class that is not known here.
    """
    with torch.no_grad():
        choices = _choose(layer, hidden, context)
    mask = context.get("mask")
    indices, weights = choices.indices, choices.weights
    if mask is not None:
        real_T1 = mask[..., -hidden.shape[-2] :].reshape(-1, 1).to(indices.device, torch.bool)
        indices = indices.masked_fill(~real_T1, -1)
    return choices._replace(
        indices=indices, weights=weights.to(indices.device).masked_fill(indices < 0, 0.0)
    )


@singledispatch
def _choose(layer: FeedForward, hidden: Tensor, context: Context) -> SlotChoices:
    raise _unknown(layer)


def _unknown(layer: FeedForward) -> InputError:
    return InputError(
        f"layers: it is not known how to read the choices of {type(layer).__name__}; register a "
        "reader for it, or leave it out"
    )


def router_tokens(layer: FeedForward, hidden: Tensor, context: Context) -> Tensor:
    """Return what the router reads, ``(T, d_model)``."""
    router_input = context.get("router_input")
    return flatten_tokens(layer, hidden if router_input is None else router_input, None)[0]


def unlimited(layer: SparseMoE, hidden: Tensor, context: Context) -> Routing:
    """Return the routing of a mixture before any limit on capacity."""
    mask = context.get("mask")
    return layer.route(
        hidden,
        context.get("router_input"),
        None if mask is None else mask.to(torch.bool),
        context.get("token_ids"),
        limited=False,
        router_state=context.get("router_state"),
    )


def _experts(routing: Routing, num_experts: int) -> SlotChoices:
    return SlotChoices(routing.indices, routing.weights, num_experts, "experts")


@_choose.register
def _(layer: SparseMoE, hidden: Tensor, context: Context) -> SlotChoices:
    return _experts(unlimited(layer, hidden, context), layer.gate.num_experts)


@_choose.register
def _(layer: SigmaMoE, hidden: Tensor, context: Context) -> SlotChoices:
    return _experts(layer.gate(router_tokens(layer, hidden, context)), layer.num_experts)


@_choose.register
def _(layer: CarvedMoE, hidden: Tensor, context: Context) -> SlotChoices:
    return _experts(layer.route(hidden, context.get("router_input")), layer.num_experts)


@_choose.register
def _(layer: HashLayer, hidden: Tensor, context: Context) -> SlotChoices:
    routing = layer.route(hidden, context.get("token_ids"), context.get("mask"))
    # Segment r of expert e is number e R + r.
    experts_TR = routing.indices.div(layer.num_hashes, rounding_mode="floor")
    return SlotChoices(experts_TR, routing.weights, layer.num_experts, "experts")


@_choose.register(STEM)
@_choose.register(PerLayerEmbedding)
def _(layer: STEM | PerLayerEmbedding, hidden: Tensor, context: Context) -> SlotChoices:
    rows_T1 = _rows(layer, hidden, context)
    return SlotChoices(rows_T1, torch.ones(rows_T1.shape), layer.vocab_size, "rows")


@_choose.register
def _(layer: Engram, hidden: Tensor, context: Context) -> SlotChoices:
    given = TokenContext(token_ids=context.get("token_ids"), mask=context.get("mask"))
    rows_TH, _ = layer.rows_of(hidden, given)
    return SlotChoices(rows_TH, torch.ones(rows_TH.shape), layer.hash.total_rows, "rows")


@_choose.register
def _(layer: L3, hidden: Tensor, context: Context) -> SlotChoices:
    given = TokenContext(token_ids=context.get("token_ids"), mask=context.get("mask"))
    return SlotChoices(*layer.weighed_rows(hidden, given), layer.num_rows, "rows")


@_choose.register
def _(layer: MoLE, hidden: Tensor, context: Context) -> SlotChoices:
    weights_TE = layer.weigh(hidden.reshape(-1, layer.d_model))
    experts_TE = torch.arange(layer.num_experts, device=hidden.device).expand_as(weights_TE)
    padding_T1 = _rows(layer, hidden, context) < 0
    return SlotChoices(
        experts_TE.masked_fill(padding_T1, -1), weights_TE, layer.num_experts, "experts"
    )


def _rows(layer: STEM | PerLayerEmbedding | MoLE, hidden: Tensor, context: Context) -> Tensor:
    given = TokenContext(token_ids=context.get("token_ids"), mask=context.get("mask"))
    return rows_of_tokens(hidden, given, layer.vocab_size, type(layer).__name__)[0]


@_choose.register
def _(layer: PEER, hidden: Tensor, context: Context) -> SlotChoices:
    experts_THK, weights_THK = layer.route(hidden, context.get("router_input"))
    return SlotChoices(experts_THK.flatten(1), weights_THK.flatten(1), layer.num_experts, "experts")


@_choose.register
def _(layer: MemoryLayer, hidden: Tensor, context: Context) -> SlotChoices:
    memory: KeyValueMemory = layer.memory
    scores_THK, slots_THK = memory.keys(memory.query(router_tokens(layer, hidden, context), None))
    weights_THK = scores_THK.softmax(dim=-1)
    return SlotChoices(slots_THK.flatten(1), weights_THK.flatten(1), layer.num_experts, "values")


@_choose.register
def _(layer: FastFeedForward, hidden: Tensor, context: Context) -> SlotChoices:
    leaf_T1 = layer.tree.descend(router_tokens(layer, hidden, context)).unsqueeze(-1)
    return SlotChoices(leaf_T1, torch.ones(leaf_T1.shape), layer.num_experts, "leaves")


@_choose.register
def _(layer: UltraFastFFF, hidden: Tensor, context: Context) -> SlotChoices:
    router_TD = router_tokens(layer, hidden, context)
    _, bottom_TP = path_neurons(
        router_TD, layer.in_weight, layer.in_bias, layer.out_weight, activation=layer.activation
    )
    bottoms = 2**layer.depth
    slots_TP = bottom_TP + bottoms * torch.arange(layer.num_trees, device=bottom_TP.device)
    return SlotChoices(slots_TP, torch.ones(slots_TP.shape), layer.num_trees * bottoms, "leaves")


@_choose.register(DenseFFN)
@_choose.register(TopKFFN)
@_choose.register(SelectiveFFN)
def _(layer: DenseFFN | TopKFFN | SelectiveFFN, hidden: Tensor, context: Context) -> SlotChoices:
    if not layer.has_slots:
        raise _unknown(layer)
    given = {name: context.get(name) for name in ("router_input", "positions")}
    inner = input_of(layer.down_proj, lambda: layer.forward(hidden, **given))
    size_TF = inner.reshape(-1, layer.d_ff).abs()
    most = max(int((size_TF != 0).sum(dim=-1).max()), 1) if len(size_TF) else 1
    weights_TK, neurons_TK = size_TF.topk(most, dim=-1)
    neurons_TK = neurons_TK.masked_fill(weights_TK == 0, -1)
    return SlotChoices(neurons_TK, weights_TK, layer.d_ff, "neurons")
