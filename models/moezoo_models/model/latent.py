"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Shapes: B sequences, S queries, L keys, H heads, R kv_lora_rank, N qk_nope_head_dim, P
qk_rope_head_dim, V v_head_dim.

The cache holds a latent of R numbers and a key of P per token, for all heads together. Keys and
values are made of them again where several positions attend; a single one reads the latents as they
are, which is the same product in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moezoo.experts.slots import PersistentSlots
from moezoo.init import init_linear, output_std
from moezoo_kernels.dtypes import at_least_fp32
from moezoo_kernels.linear import Linear, is_plain_linear
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention import SelfAttention
from moezoo_models.model.attention_backends import soft_capped
from moezoo_models.model.latent_options import LATENT_EPS, check_latent
from moezoo_models.model.norm import NORMS
from moezoo_models.model.rotary import halves, rotate

if TYPE_CHECKING:
    from moezoo_models.model.config import MoezooConfig


class LatentAttention(SelfAttention):
    """Multi-head latent attention, under the names of DeepSeek-V2 in transformers.

    Args:
        config: the model's configuration, with ``latent_attention``.
        layer_idx: number of the layer, which is its place in the cache.
    """

    def __init__(self, config: MoezooConfig, layer_idx: int) -> None:
        options = check_latent(config.latent_attention)
        scaling = config.attention_multiplier or options.scaling(config.rope_parameters)
        super().__init__(config, layer_idx, scaling)
        self.options = options
        width, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.num_heads = heads
        norm, rank = NORMS[config.norm], options.kv_lora_rank
        if options.q_lora_rank is None:
            self.q_proj = Linear(width, heads * options.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(width, options.q_lora_rank, bias=bias)
            self.q_a_layernorm = norm(options.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(options.q_lora_rank, heads * options.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, rank + options.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = norm(rank, LATENT_EPS)
        up = heads * (options.qk_nope_head_dim + options.v_head_dim)
        self.kv_b_proj = Linear(rank, up, bias=False)
        self.o_proj = Linear(heads * options.v_head_dim, width, bias=config.attention_output_bias)

    def reset_parameters(self) -> None:
        """Draw projections from N(0, 1/fan_in), the output's further / sqrt(2 num_layers)."""
        for projection in self.children():
            if isinstance(projection, nn.Linear) and projection is not self.o_proj:
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
            hidden: ``(B, S, hidden_size)``.
            rotary: cos and sin at the positions, from :class:`RotaryEmbedding`, ``(B, S, P)``.
            attention_mask: as the backend's mask function made it.
            past_key_values: cache that the latents and the keys with positions are added to.
            slots: None, as the configuration has made sure.
            kwargs: passed on to the backend.

        Returns:
            ``(B, S, hidden_size)``; the attention weights of the eager backend; and None.
        """
        assert slots is None
        options, (batch, length, _) = self.options, hidden.shape
        query = self._queries(hidden).view(batch, length, self.num_heads, -1).transpose(1, 2)
        plain, turned = query.split((options.qk_nope_head_dim, options.qk_rope_head_dim), dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden)
        latent, key = compressed.split((options.kv_lora_rank, options.qk_rope_head_dim), dim=-1)
        # As one head each, so that caches and masks take them for keys and values.
        latent, key = self.kv_a_layernorm(latent).unsqueeze(1), key.unsqueeze(1)
        if rotary is not None and self.rotated:
            turned, key = self._turned(turned, rotary), self._turned(key, rotary)
        # Under autocast norms and rotation are in fp32, and backends want one dtype.
        kind = compressed.dtype
        plain, turned, latent, key = (x.to(kind) for x in (plain, turned, latent, key))
        if past_key_values is not None:
            latent, key = past_key_values.update(latent, key, self.layer_idx)
        if past_key_values is not None and length == 1 and self._reads_latents():
            attended, weights = self._one(plain, turned, latent, key, attention_mask)
        else:
            query = torch.cat((plain, turned), dim=-1)
            attended, weights = self._all(query, latent, key, attention_mask, kwargs)
        return self.o_proj(attended.reshape(batch, length, -1)), weights, None

    def _queries(self, hidden: Tensor) -> Tensor:
        """Project to the queries, ``(B, S, H (N + P))``; eq. 12 to 15 of the paper."""
        if self.options.q_lora_rank is None:
            return self.q_proj(hidden)
        queries: Tensor = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        return queries

    def _turned(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(halves(x) if self.options.rope_interleave else x, *rotary)

    def _all(
        self, query: Tensor, latent: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Make keys and values of the latents and attend, ``(B, S, H, V)``; eq. 10, 11, 16 to 18.

        Args:
            query: ``(B, H, S, N + P)``.
            latent: ``(B, 1, L, R)``.
            key: ``(B, 1, L, P)``.
            mask: as the backend wants it.
            kwargs: passed on to the backend.
        """
        widths = (self.options.qk_nope_head_dim, self.options.v_head_dim)
        made = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1))
        plain, value = made.transpose(1, 2).split(widths, dim=-1)
        keys = torch.cat((plain, key.expand(-1, self.num_heads, -1, -1)), dim=-1)
        # Fused operators want values as wide as keys; without them all scores would be kept.
        missing = keys.shape[-1] - value.shape[-1]
        if missing > 0 and attention_backend(self.config) in ("sdpa", "xformers"):
            attended, weights = self.attend(query, keys, F.pad(value, (0, missing)), mask, **kwargs)
            return attended[..., : value.shape[-1]], weights
        return self.attend(query, keys, value, mask, **kwargs)

    def _reads_latents(self) -> bool:
        """Return whether a single position may attend to latents.

        Else what makes keys and values is adapted, so that its weight alone does not say what it
        computes; or the backend's masks are of its own kind; or weights are dropped in training.
        """
        known = attention_backend(self.config) in ("sdpa", "eager")
        return known and is_plain_linear(self.kv_b_proj) and not self.training

    def _one(
        self, plain: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from one position to the latents themselves, ``(B, 1, H, V)``.

        ``q (W c)`` is ``(q W) c``: what makes keys of latents is applied to the query, and what
        makes values to the weighted sum of latents, once in place of once per earlier token (the
        paper's section 2.1.2).

        Args:
            plain: the queries without positions, ``(B, H, 1, N)``.
            turned: those with positions, ``(B, H, 1, P)``.
            latent: ``(B, 1, L, R)``.
            key: ``(B, 1, L, P)``.
            mask: ``(B or 1, 1, 1, L)``, bool or numbers to add; None where all are seen.
        """
        widths = (self.options.qk_nope_head_dim, self.options.v_head_dim)
        made = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # (H, N + V, R)
        of_keys, of_values = made.split(widths, dim=1)
        latent, key = latent.squeeze(1), key.squeeze(1)
        query = torch.einsum("bhn,hnr->bhr", plain.squeeze(2), of_keys).to(latent.dtype)
        scores = (query @ latent.mT + turned.squeeze(2) @ key.mT) * self.scaling  # (B, H, L)
        if self.softcap is not None:
            scores = soft_capped(scores, self.softcap)
        if mask is not None:
            seen = mask[:, :, 0]
            if seen.dtype == torch.bool:
                scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            else:
                scores = scores + seen
        weights = at_least_fp32(scores).softmax(-1).to(latent.dtype)
        attended = torch.einsum("bhr,hvr->bhv", weights @ latent, of_values).unsqueeze(1)
        shown = weights.unsqueeze(2) if attention_backend(self.config) == "eager" else None
        return attended, shown
