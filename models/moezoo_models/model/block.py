"""One block of the decoder, and the choice of its feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward, registered
from moezoo.routing.losses import masked_mean
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention import Attention
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.joint_attention import check_joint_backend
from moezoo_models.model.norm import RMSNorm
from moezoo_models.model.persistent import JoinedSlots, build_slots


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then a feed-forward block of the zoo.

    A layer of kind ``attention`` leaves attention alone in the block: no second norm, no second
    sum.

    Attributes:
        router_input: what the router of the feed-forward block reads.
    """

    def __init__(self, config: MoezooConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        self.router_input = config.router_input(layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm: RMSNorm | None = None
        if isinstance(self.mlp, JoinedSlots):
            check_joint_backend(attention_backend(config))
        else:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Any,
        token_ids: Tensor | None,
        token_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        """Return the new hidden states and the feed-forward block's losses and statistics."""
        attended, _, context_share = self.self_attn(
            self.input_layernorm(hidden),
            rotary,
            attention_mask,
            past_key_values=past_key_values,
            slots=self.mlp.slots if isinstance(self.mlp, JoinedSlots) else None,
            **kwargs,
        )
        entering, hidden = hidden, hidden + attended
        if self.post_attention_layernorm is None:
            return hidden, {}, {"context_mass": _mean(context_share, token_mask)}
        answer = self.mlp(
            self.post_attention_layernorm(hidden),
            token_ids=token_ids,
            router_input=self._read_by_router(entering, hidden),
            mask=token_mask,
        )
        return hidden + answer.hidden, answer.losses, answer.stats

    def _read_by_router(self, entering: Tensor, attended: Tensor) -> Tensor | None:
        """Return what the router reads; None if that is what the experts read."""
        residuals = {"pre_attention": entering, "post_attention": attended}
        return residuals.get(self.router_input)


def build_feed_forward(config: MoezooConfig, layer: int) -> FeedForward:
    """Build the feed-forward block that the configuration's rules choose for a layer.

    Raises:
        InputError: arguments that the layer refuses; a layer of kind ``attention`` that does not
            fit the model's; or one in which tokens see later tokens, unless ``allow_non_causal``.
    """
    number, rule = config.feed_forward(layer)
    try:
        if registered(rule["class_path"]).kind == "attention":
            return build_slots(rule, config)
        own = {key: rule[key] for key in ("class_path", "init_args")}
        block = FeedForward.from_config(own, d_model=config.hidden_size)
    except InputError as error:
        raise InputError(f"ffn[{number}]: {error}") from error
    name = type(block).__name__
    if not block.causal and not config.allow_non_causal:
        raise InputError(
            f"ffn[{number}]: {name} as configured is not causal: a token would see later tokens; "
            "choose another routing, or set allow_non_causal: true"
        )
    room = getattr(block, "vocab_size", config.vocab_size)
    if block.needs_token_ids and room < config.vocab_size:
        raise InputError(
            f"ffn[{number}]: {name} has vocab_size {room}, the model {config.vocab_size}; "
            "give the layer at least as many"
        )
    return block


def _mean(context_share: Tensor, token_mask: Tensor | None) -> Tensor:
    """Average ``(batch, heads, sequence)`` over heads and real tokens."""
    flat_mask = None if token_mask is None else token_mask.flatten()
    return masked_mean(context_share.detach().mean(1).flatten(), flat_mask)
