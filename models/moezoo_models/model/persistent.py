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

from moezoo import PersistentMemoryAttention
from moezoo.errors import InputError
from moezoo.experts.slots import PersistentSlots
from moezoo.feed_forward import Cost, FeedForward

if TYPE_CHECKING:
    from moezoo_models.model.config import MoezooConfig


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
        InputError: arguments that do not fit; or a layer that the decoder cannot join with its
            attention.
    """
    if config.latent_attention is not None:
        raise InputError(
            f"class_path: {rule['class_path']} joins attention whose heads have keys and values of "
            "their own (latent_attention); choose another, or set latent_attention to null"
        )
    with torch.device("meta"):  # only to check the arguments and learn their defaults
        layer = FeedForward.from_config(rule, d_model=config.hidden_size)
    if not isinstance(layer, PersistentMemoryAttention):
        name = type(layer).__name__
        raise InputError(
            f"class_path: {name} is of kind '{layer.kind}', which the decoder has no place for; "
            "choose another"
        )
    return JoinedSlots(layer, config)
