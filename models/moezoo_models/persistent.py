"""Blocks in which attention is the feed-forward layer too: it reads persistent slots.

A rule of kind ``attention`` takes a block's feed-forward half away. The block's own attention, with
its grouped keys, rotary positions, cache and masks, then shares its softmax with the slots
(Sukhbaatar et al. 2019, arXiv:1907.01470). Slots have no position, so they see queries before these
are rotated; they are seen by every token and never cached.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo import PersistentMemoryAttention
from moezoo.errors import InputError
from moezoo.experts.slots import PersistentSlots, join
from moezoo.feed_forward import Cost, FeedForward
from moezoo.routing.tree import at_least_fp32
from moezoo_models.attention_backends import repeat_heads

if TYPE_CHECKING:
    from moezoo_models.config import MoezooConfig

JOINT_BACKENDS = ("sdpa", "eager")


class JoinedSlots(FeedForward):
    """The slots of a block, in the place of its feed-forward layer; its attention reads them.

    Args:
        layer: what the configuration asks for; its projections are not used, the block has its own.
        config: the model's configuration.

    Raises:
        InputError: the layer's heads are not the model's, or it hides tokens from themselves.
    """

    kind = "attention"

    def __init__(self, layer: PersistentMemoryAttention, config: MoezooConfig) -> None:
        super().__init__(layer.d_model)
        if layer.num_heads not in (None, config.num_attention_heads):
            raise InputError(
                f"num_heads: {layer.num_heads} is not the model's {config.num_attention_heads}; "
                "leave it out"
            )
        if not layer.include_self:
            raise InputError(
                "include_self: in the decoder a token always sees itself; leave it true"
            )
        self._asked_for = layer.config()
        heads, width = config.num_attention_heads, cast(int, config.head_dim)
        self.slots = PersistentSlots(heads, layer.num_slots, width)

    def config(self) -> dict[str, Any]:
        """Return the configuration of the layer that was asked for."""
        return copy.deepcopy(self._asked_for)

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw the slots anew."""
        self.slots.reset_parameters()

    def cost(self) -> Cost:
        """Count the slots, ``4 N H C`` FLOPs; the projections are the attention's."""
        parameters = self.slots.keys.numel() + self.slots.values.numel()
        size = self.slots.keys.element_size()
        return Cost(parameters, parameters, self.slots.flops_per_token(), parameters * size)


def build_slots(rule: Mapping[str, Any], config: MoezooConfig) -> JoinedSlots:
    """Build what a rule of kind ``attention`` puts into a block.

    Raises:
        InputError: arguments that do not fit; or a layer that the decoder can not join with its
            attention.
    """
    with torch.device("meta"):  # only to check the arguments and learn their defaults
        layer = FeedForward.from_config(rule, d_model=config.hidden_size)
    if not isinstance(layer, PersistentMemoryAttention):
        name = type(layer).__name__
        raise InputError(f"{name} is of kind '{layer.kind}', which the decoder has no place for")
    return JoinedSlots(layer, config)


def check_joint_backend(name: str | None) -> None:
    """Refuse an attention backend that can not share its softmax.

    Raises:
        InputError: names the backends that can.
    """
    if name not in JOINT_BACKENDS:
        raise InputError(
            f"attention: '{name}' can not share its softmax with persistent slots; "
            f"{' and '.join(JOINT_BACKENDS)} can"
        )


def joint_attention(
    module: nn.Module,
    slots: PersistentSlots,
    plain_query: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    backend: str | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attend to context and slots with one softmax.

    Args:
        module: the attention, which knows whether it is being trained.
        slots: the slots of its heads.
        plain_query: ``(batch, heads, queries, head_dim)``, without positions, for the slots.
        query: the same with positions, for the context.
        key: ``(batch, kv_heads, keys, head_dim)``.
        value: as ``key``.
        attention_mask: as the backend's mask function made it.
        backend: name of the attention backend.
        scaling: factor on the context's scores.
        dropout: probability of dropping a weight, of context and slots alike, while training.

    Returns:
        ``(batch, queries, heads, head_dim)``; the weights of the context, ``(batch, heads, queries,
        keys)``, from the eager backend only; and their sums, ``(batch, heads, queries)``.

    Raises:
        InputError: the backend can not share its softmax.
    """
    check_joint_backend(backend)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    if backend == "sdpa" and attention_mask is None and query.shape[2] > 1:
        # sdpa's mask function leaves plain causality to the operator.
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=key.device).tril()
    scores = at_least_fp32(query @ key.mT) * scaling
    scores = _masked(scores, attention_mask)
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    context = weights.to(value.dtype) @ value
    answer, answer_lse = slots(plain_query, dropout)
    joined, mass = join(context, scores.logsumexp(-1, keepdim=True), answer, answer_lse)
    shown = (weights * mass).to(value.dtype) if backend == "eager" else None
    return joined.transpose(1, 2), shown, mass.squeeze(-1)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Hide keys by the least finite number: a row of padding must not become NaN."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
