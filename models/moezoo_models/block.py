"""One block of the decoder, and the choice of its feed-forward layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward
from moezoo_models.attention import Attention
from moezoo_models.config import MoezooConfig
from moezoo_models.norm import RMSNorm


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then a feed-forward block of the zoo."""

    def __init__(self, config: MoezooConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = build_feed_forward(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the new hidden states and the feed-forward block's losses and statistics."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden),
            rotary,
            attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = hidden + attended
        answer = self.mlp(
            self.post_attention_layernorm(hidden), token_ids=token_ids, mask=token_mask
        )
        return hidden + answer.hidden, answer.losses, answer.stats


def build_feed_forward(config: MoezooConfig, layer: int) -> FeedForward:
    """Build the feed-forward block that the configuration's rules choose for a layer.

    Raises:
        InputError: arguments that the layer refuses; a layer that is no feed-forward block; or
            one in which tokens see later tokens, unless ``allow_non_causal``.
    """
    number, rule = config.feed_forward(layer)
    try:
        block = FeedForward.from_config(rule, d_model=config.hidden_size)
    except InputError as error:
        raise InputError(f"ffn[{number}]: {error}") from error
    name = type(block).__name__
    if block.kind != "feed_forward":
        raise InputError(f"ffn[{number}]: {name} is of kind '{block.kind}', not feed_forward")
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
