"""Causal self-attention with grouped queries, and optional rotary positions and query-key norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from moezoo.experts.slots import PersistentSlots
from moezoo.init import init_linear, output_std
from moezoo_kernels.linear import Linear
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention_backends import ATTENTION, eager_attention
from moezoo_models.model.joint_attention import joint_attention
from moezoo_models.model.norm import NORMS
from moezoo_models.model.rotary import rotate

if TYPE_CHECKING:
    from moezoo_models.model.config import MoezooConfig


class SelfAttention(nn.Module):
    """What all attention of the decoder has.

    Args:
        config: the model's configuration.
        layer_idx: number of the layer, which is its place in the key-value cache.
        scaling: factor on the scores.
        groups: queries that share a key and a value.
    """

    is_causal = True

    def __init__(
        self, config: MoezooConfig, layer_idx: int, scaling: float, groups: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = scaling
        self.num_key_value_groups = groups
        self.softcap = config.attn_logit_softcapping
        self.rotated = layer_idx not in config.nope_layers
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

    def reset_parameters(self) -> None:
        """Draw the projections anew."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """The probability of dropping a weight, now."""
        return self.config.attention_dropout if self.training else 0.0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by the model's backend: ``(batch, queries, heads, head_dim)``, and its weights."""
        compute = ATTENTION.get_interface(attention_backend(self.config), eager_attention)
        options: dict[str, Any] = {"dropout": self.dropout, "scaling": self.scaling}
        options |= {"sliding_window": self.sliding_window, **kwargs}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        attended, weights = compute(self, query, key, value, mask, **options)
        return attended, weights


class Attention(SelfAttention):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) under Llama's names.

    Args:
        config: the model's configuration.
        layer_idx: number of the layer, which is its place in the key-value cache.
    """

    def __init__(self, config: MoezooConfig, layer_idx: int) -> None:
        width, heads = config.hidden_size, config.num_attention_heads
        kv_heads, head_dim = config.num_key_value_heads or heads, config.head_dim or width // heads
        scaling = config.attention_multiplier or head_dim**-0.5
        super().__init__(config, layer_idx, scaling, heads // kv_heads)
        self.head_dim = head_dim

        queries, keys, bias = heads * self.head_dim, kv_heads * self.head_dim, config.attention_bias
        self.q_proj = Linear(width, queries, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(queries, width, bias=config.attention_output_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norms_projections = config.qk_norm and config.qk_norm_over == "projection"
        if config.qk_norm:
            sizes = (queries, keys) if self.norms_projections else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (
                NORMS[config.norm](size, config.rms_norm_eps) for size in sizes
            )

    def reset_parameters(self) -> None:
        """Draw projections from N(0, 1/fan_in), the output's further / sqrt(2 num_layers)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init_linear(projection, projection.in_features**-0.5)
        depth = self.config.num_hidden_layers
        init_linear(self.o_proj, output_std(self.o_proj.in_features, depth))

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Any,
        past_key_values: Cache | None = None,
        slots: PersistentSlots | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend from each position to those before it.

        Args:
            hidden: ``(batch, sequence, hidden_size)``.
            rotary: cos and sin at the positions, from :class:`RotaryEmbedding`; None where
                positions are learned.
            attention_mask: as the backend's mask function made it.
            past_key_values: cache that these keys and values are added to.
            slots: persistent slots that take part in the softmax.
            kwargs: passed on to the backend.

        Returns:
            ``(batch, sequence, hidden_size)``; the attention weights of the eager backend; and,
            where there are slots, the share of the weights that is the context's,
            ``(batch, heads, sequence)``.
        """
        batch, length, _ = hidden.shape
        heads = (batch, length, -1, self.head_dim)
        query = self._normed(self.q_norm, self.q_proj(hidden), heads).transpose(1, 2)
        key = self._normed(self.k_norm, self.k_proj(hidden), heads).transpose(1, 2)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)

        # Under autocast the rotation is done in fp32, and backends want one dtype.
        plain_query = query.to(value.dtype)
        if rotary is not None and self.rotated:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        context_share = None
        if slots is not None:
            attended, weights, context_share = joint_attention(
                slots,
                plain_query,
                query,
                key,
                value,
                attention_mask,
                attention_backend(self.config),
                scaling=self.scaling,
                dropout=self.dropout,
            )
        else:
            attended, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(attended.reshape(batch, length, -1)), weights, context_share

    def _normed(self, norm: nn.Module, projected: Tensor, heads: tuple[int, ...]) -> Tensor:
        """Normalise queries or keys, and split them into ``(batch, sequence, heads, head_dim)``."""
        if self.norms_projections:
            return norm(projected).view(heads)
        return norm(projected.view(heads))
