"""The hidden neurons of a layer: their activations on tokens, and the vectors they write.

A feed-forward layer is a sum over neurons, ``y = Σ_j m_j v_j``: a neuron's activation times the
weight that a router gave it is its coefficient m, its column of the output matrix its value v (Geva
et al. 2021, arXiv:2012.14913, eq. 2). In a mixture of experts neuron f of expert e is number
``e F + f``; in PEER an expert is one neuron, and in memories a slot is, whose activation is the
softmax of its score.

Shapes: T tokens, D d_model, N neurons, F neurons of one expert, R tokens of a block, J neurons of
a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from moezoo.analysis.around_experts import Around, around
from moezoo.analysis.choices import SlotChoices, router_tokens, slot_choices, unlimited
from moezoo.analysis.watching import Context, input_of, token_mask
from moezoo.errors import InputError
from moezoo.experts import MLPExperts
from moezoo.feed_forward import FeedForward, flatten_tokens
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import DenseFFN
from moezoo.layers.fast_feed_forward import FastFeedForward
from moezoo.layers.hash import HashLayer
from moezoo.layers.memory_layer import MemoryLayer
from moezoo.layers.peer import PEER
from moezoo.layers.selective_ffn import SelectiveFFN
from moezoo.layers.sigma_moe import SigmaMoE
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.layers.top_k_ffn import TopKFFN
from moezoo.layers.ultra_fast_fff import UltraFastFFF
from moezoo.routing import tree
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.linear import linear

_DENSE_ROWS = 1024  # tokens computed at once, where all neurons count
_TABLE_ROWS = 128  # ... and where each token has its own


class NeuronBlock(NamedTuple):
    """Some neurons on some tokens.

    Attributes:
        rows: ``(R,)`` which tokens.
        neurons: ``(J,)`` which neurons, or ``(R, J)`` where each token has its own; -1 is none.
        activations: ``(R, J)``; of gated linear units the product of both halves.
        weights: broadcasts to ``(R, J)``: what activations are multiplied with besides.
        before: ``(R, J)``, what goes into the activation function (the gate's, if gated); None
            where each token has neurons of its own.
    """

    rows: Tensor
    neurons: Tensor
    activations: Tensor
    weights: Tensor
    before: Tensor | None = None


class Values(Protocol):
    """The vectors that neurons write."""

    def __call__(self, neurons_M: Tensor, hidden_MD: Tensor | None = None, /) -> Tensor:
        """Return the vectors ``(M, D)`` of neurons ``(M,)``.

        Args:
            neurons_M: which neurons.
            hidden_MD: the token of each, ``(M, D)``, where a gate of the token scales what is
                written, as in :class:`moezoo.MemoryPlus`; without it the gate counts as one. Other
                layers write the same vectors for every token.
        """


@dataclass(frozen=True)
class Neurons:
    """One set of neurons of a layer.

    Attributes:
        name: empty, or which part of the layer they are: ``shared expert``, ``master leaf``.
        number: how many, N.
        width: how many make one expert, leaf or tree; N where nothing is chosen.
        unit: what such a group is, or None where a layer has no groups.
        read: returns the activations of the real tokens of a pass, block by block.
        values: returns the vectors ``(M, D)`` that the neurons ``(M,)`` write; see :class:`Values`.
            A layer's output is the sum of activations times weights times values, and biases.
    """

    name: str
    number: int
    width: int
    unit: str | None
    read: Callable[[Tensor, Context], Iterator[NeuronBlock]]
    values: Values

    def label(self, neuron: int) -> str:
        """Name a neuron: ``17``, or ``expert 3, 17``."""
        if self.unit is None:
            return str(neuron)
        group, place = divmod(neuron, self.width)
        return f"{self.unit} {group}" if self.width == 1 else f"{self.unit} {group}, {place}"


@singledispatch
def neurons_of(layer: FeedForward) -> list[Neurons]:
    """List the sets of neurons of a layer of the zoo.

    Raises:
        InputError: the layer is of a class that is not known here.
    """
    raise InputError(
        f"layers: it is not known how to read the neurons of {type(layer).__name__}; register a "
        "reader for it, or leave it out"
    )


_Dense: TypeAlias = DenseFFN | TopKFFN | SelectiveFFN


def _real_rows(hidden: Tensor, context: Context) -> Tensor:
    return token_mask(hidden, context).nonzero().squeeze(-1).to(hidden.device)


def _dense(
    layer: _Dense,
    name: str = "",
    scale: Callable[[Tensor, Context], Tensor] | None = None,
) -> Neurons:
    """Describe a block in which all neurons run, each token's output or neurons perhaps scaled."""

    def read(hidden: Tensor, context: Context) -> Iterator[NeuronBlock]:
        tokens_TD = flatten_tokens(layer, hidden, None)[0]
        neurons_F = torch.arange(layer.d_ff, device=hidden.device)
        asked = context.get("router_input") if isinstance(layer, TopKFFN) else None
        asked_TD = None if asked is None else flatten_tokens(layer, asked, None)[0]
        places = context.get("positions")
        ones_T1 = tokens_TD.new_ones(len(tokens_TD), 1)
        scale_TF = ones_T1 if scale is None else scale(hidden, context)
        for rows in _real_rows(hidden, context).split(_DENSE_ROWS):
            x_RD = tokens_TD[rows]
            inner_RF = _inner(
                layer,
                x_RD,
                router_input=None if asked_TD is None else asked_TD[rows],
                positions=None if places is None else places.reshape(-1)[rows],
            )
            yield NeuronBlock(rows, neurons_F, inner_RF, scale_TF[rows], _before(layer, x_RD))

    def values(neurons: Tensor, _: Tensor | None = None, /) -> Tensor:
        return layer.down_proj.weight.t()[neurons]

    return Neurons(name, layer.d_ff, layer.d_ff, None, read, values)


def _inner(layer: _Dense, x_RD: Tensor, **context: Tensor | None) -> Tensor:
    return input_of(layer.down_proj, lambda: layer.forward(x_RD, **context))


def _before(layer: _Dense, x_RD: Tensor) -> Tensor:
    if isinstance(layer, SelectiveFFN):
        first = layer.gate_proj if layer.gated else layer.up_proj
        return linear(input_of(first, lambda: layer.forward(x_RD)), first.weight, first.bias)
    if not layer.gated:
        return layer.up_proj(x_RD)
    return layer.gate_proj(x_RD[:, : layer.gate_proj.in_features])


def _stacked(
    experts: MLPExperts,
    choose: Callable[[Tensor, Context], SlotChoices],
    unit: str,
    weigh_inputs: bool = False,
    within: Around = Around(),  # noqa: B008 - immutable
) -> Neurons:
    """Describe stacked MLPs of which each token has some, weighed by their outputs or inputs."""
    width = experts.d_expert

    def read(hidden: Tensor, context: Context) -> Iterator[NeuronBlock]:
        choices = choose(hidden, context)
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        for e in choices.indices.unique().tolist():
            if not 0 <= e < experts.num_experts:  # none, or one that computes nothing
                continue
            neurons_F = torch.arange(e * width, (e + 1) * width, device=hidden.device)
            rows, places = (choices.indices == e).nonzero(as_tuple=True)
            weights = choices.weights[rows, places].unsqueeze(-1)
            for part in torch.arange(len(rows), device=rows.device).split(_DENSE_ROWS):
                x_RD, weights_R1 = tokens_TD[rows[part]], weights[part]
                if weigh_inputs:
                    x_RD = x_RD * weights_R1.to(x_RD.dtype)
                    weights_R1 = torch.ones_like(weights_R1)
                up = _expert_up(experts, e, within.read(x_RD))
                inner_RF = experts.activate(up)
                weights_R1 = weights_R1 * within.factors(experts, e, inner_RF)
                before_RF = experts.before_activation(up)
                yield NeuronBlock(rows[part], neurons_F, inner_RF, weights_R1, before_RF)

    def values(neurons: Tensor, _: Tensor | None = None, /) -> Tensor:
        expert = neurons.div(width, rounding_mode="floor")
        return within.written(experts.down_proj[expert, :, neurons % width])

    return Neurons("", experts.num_experts * width, width, unit, read, values)


def _expert_up(experts: MLPExperts, expert: int, x_RD: Tensor) -> Tensor:
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
    return linear(x_RD, experts.gate_up_proj[expert], bias)


def _merged(indices_RJ: Tensor, weights_RJ: Tensor) -> tuple[Tensor, Tensor]:
    """Add the weights of a neuron that several heads chose; what gets free is neuron -1."""
    order = indices_RJ.sort(dim=-1)
    is_new = torch.ones_like(order.values, dtype=torch.bool)
    is_new[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    place = is_new.cumsum(dim=-1) - 1
    indices = torch.full_like(indices_RJ, -1).scatter(1, place, order.values)
    weights = weights_RJ.gather(1, order.indices)
    return indices, torch.zeros_like(weights).scatter_add(1, place, weights)


def _table(
    number: int,
    unit: str,
    read_rows: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    choose: Callable[[Tensor, Context], SlotChoices],
    values: Values,
    width: int = 1,
) -> Neurons:
    """Describe neurons of which each token reads its own few."""

    def read(hidden: Tensor, context: Context) -> Iterator[NeuronBlock]:
        choices = choose(hidden, context)
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        for rows in _real_rows(hidden, context).split(_TABLE_ROWS):
            indices, chosen = _merged(choices.indices[rows], choices.weights[rows])
            activations, weights = read_rows(tokens_TD[rows], indices, chosen)
            yield NeuronBlock(rows, indices, activations, weights)

    return Neurons("", number, width, unit, read, values)


@neurons_of.register(DenseFFN)
@neurons_of.register(TopKFFN)
@neurons_of.register(SelectiveFFN)
def _(layer: _Dense) -> list[Neurons]:
    return [_dense(layer)]


@neurons_of.register
def _(layer: SparseMoE) -> list[Neurons]:
    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        return slot_choices(layer, hidden, context)

    def scale(hidden: Tensor, context: Context) -> Tensor:
        if layer.shared_gate:
            return layer.shared_expert_gate(flatten_tokens(layer, hidden, None)[0]).sigmoid()
        weights_TS = unlimited(layer, hidden, context).shared_weights
        assert weights_TS is not None
        return weights_TS.repeat_interleave(layer.d_shared // weights_TS.shape[-1], dim=-1)

    how = layer.router.weights
    found = [_stacked(layer.experts, choose, "expert", how.apply_to == "input", around(layer))]
    if layer.d_shared:
        scaled = scale if layer.shared_gate or how.with_shared else None
        found.append(_dense(layer.shared_expert, "shared expert", scaled))
    return found


@neurons_of.register
def _(layer: SigmaMoE) -> list[Neurons]:
    return [_stacked(layer.experts, lambda h, context: slot_choices(layer, h, context), "expert")]


@neurons_of.register
def _(layer: CarvedMoE) -> list[Neurons]:
    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        choices = slot_choices(layer, hidden, context)
        gates = 1.0 + choices.weights * layer.u[choices.indices.clamp(min=0)]
        return choices._replace(weights=gates)

    found = [_stacked(layer.experts, choose, "expert")]
    if layer.num_shared_experts:
        found.append(_dense(layer.shared_expert, "shared expert"))
    return found


@neurons_of.register
def _(layer: HashLayer) -> list[Neurons]:
    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        routing = layer.route(hidden, context.get("token_ids"), context.get("mask"))
        number = layer.experts.num_experts
        return SlotChoices(routing.indices, routing.weights, number, "experts")

    # With several hash functions, what is chosen is a segment of an expert.
    return [_stacked(layer.experts, choose, "expert" if layer.num_hashes == 1 else "segment")]


@neurons_of.register
def _(layer: FastFeedForward) -> list[Neurons]:
    mix = layer.master_mix.sigmoid() if layer.d_master else torch.ones(())

    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        choices = slot_choices(layer, hidden, context)
        if layer.hard is False:
            logits_TN = layer.tree.logits(router_tokens(layer, hidden, context))
            p_TE = tree.leaf_probabilities((-logits_TN).sigmoid(), logits_TN.sigmoid())
            every_TE = torch.arange(layer.num_experts, device=p_TE.device).expand_as(p_TE)
            every_TE = every_TE.masked_fill(choices.indices < 0, -1)
            choices = choices._replace(indices=every_TE, weights=p_TE)
        return choices._replace(weights=choices.weights * mix)

    found = [_stacked(layer.leaves, choose, "leaf")]
    if layer.d_master:

        def scale(hidden: Tensor, _: Context) -> Tensor:
            return (1 - mix).expand(hidden[..., 0].numel(), 1)

        found.append(_dense(layer.master, "master leaf", scale))
    return found


@neurons_of.register
def _(layer: PEER) -> list[Neurons]:
    experts = layer.experts

    def read_rows(x_RD: Tensor, indices: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        up = torch.einsum("rd,rjd->rj", x_RD, experts.u[indices.clamp(min=0)])
        if experts.gate is not None:
            gate = torch.einsum("rd,rjd->rj", x_RD, experts.gate[indices.clamp(min=0)])
            up = torch.cat([gate, up], dim=-1)
        return activate(up, experts.activation, experts.gated), chosen

    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        return slot_choices(layer, hidden, context)

    return [
        _table(
            layer.num_experts, "expert", read_rows, choose, lambda ids, _=None, /: experts.v[ids]
        )
    ]


@neurons_of.register
def _(layer: MemoryLayer) -> list[Neurons]:
    def read_rows(x_RD: Tensor, indices: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return chosen, torch.ones_like(chosen)

    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        return slot_choices(layer, hidden, context)

    def values(neurons: Tensor, hidden: Tensor | None = None, /) -> Tensor:
        return layer.project(layer.memory.table.weight[neurons], hidden)

    return [_table(layer.num_experts, "value", read_rows, choose, values)]


@neurons_of.register
def _(layer: UltraFastFFF) -> list[Neurons]:
    rows_ND, bias_N = layer.in_weight.flatten(0, 1), layer.in_bias.flatten()
    out_ND = layer.out_weight.flatten(0, 1)

    def choose(hidden: Tensor, context: Context) -> SlotChoices:
        """List the neurons on the way to the bottom, tree by tree."""
        choices = slot_choices(layer, hidden, context)
        bottoms, nodes = 2**layer.depth, layer.num_nodes
        first_P = nodes * torch.arange(layer.num_trees, device=choices.indices.device)
        node_TP = choices.indices % bottoms + bottoms - 1
        way = [node_TP]
        for _ in range(layer.depth):
            node_TP = (node_TP - 1).div(2, rounding_mode="floor")
            way.append(node_TP)
        indices = (torch.stack(way, dim=-1) + first_P.unsqueeze(-1)).flatten(1)
        unused = (choices.indices < 0).any(dim=-1, keepdim=True)
        indices = indices.masked_fill(unused, -1)
        return SlotChoices(indices, torch.ones(indices.shape), len(out_ND), "neurons")

    def read_rows(x_RD: Tensor, indices: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        asked = indices.clamp(min=0)
        logits = torch.einsum("rd,rjd->rj", x_RD, rows_ND[asked]) + bias_N[asked]
        return ACTIVATIONS[layer.activation](logits), chosen.to(logits)

    return [
        _table(
            len(out_ND),
            "tree",
            read_rows,
            choose,
            lambda ids, _=None, /: out_ND[ids],
            width=layer.num_nodes,
        )
    ]
