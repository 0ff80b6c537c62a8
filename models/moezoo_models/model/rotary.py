"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split as in
Llama, or by neighbours as in DeepSeek.

Scaled variants (linear, dynamic, yarn, llama3, ...) are transformers' own: ``rope_parameters`` in
the model's configuration means here what it means there.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from moezoo_models.adapters.torch import MovedModule

if TYPE_CHECKING:
    from moezoo_models.model.config import MoezooConfig


class RotaryEmbedding(MovedModule):
    """Cosines and sines of the rotation angles at given positions.

    The attributes are those that transformers' ``dynamic_rope_update`` reads and writes.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: MoezooConfig) -> None:
        super().__init__()
        self.config = config  # of which rope_parameters are of one kind of layers
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        """Compute the angular frequencies, ``(turned / 2,)``, and the factor on cos and sin."""
        if self.rope_type == "default":
            config = self.config
            head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
            turned = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, turned, 2, dtype=torch.float) / turned
            return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)

    def reset_parameters(self) -> None:
        """Recompute the buffers, which no checkpoint holds."""
        inv_freq, self.attention_scaling = self._frequencies()
        with torch.no_grad():
            self.inv_freq.copy_(inv_freq)
            self.original_inv_freq.copy_(inv_freq)

    def moved(self) -> None:
        """Return to fp32 when the model is cast: bf16 frequencies drift."""
        if self.inv_freq.dtype != torch.float32:
            frequencies = self._frequencies()[0].to(self.inv_freq.device)
            self.inv_freq, self.original_inv_freq = frequencies, frequencies.clone()

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cos`` and ``sin``, ``(batch, sequence, turned)``, in the dtype of ``x``."""
        # fp32 whatever autocast says: bf16 cannot tell position 1000 from 1001.
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class RotaryByType(nn.Module):
    """One rotary embedding per type of layers, each with parameters of its own (Gemma 3)."""

    def __init__(self, config: MoezooConfig) -> None:
        super().__init__()
        self.by_type = nn.ModuleDict()
        for kind in dict.fromkeys(config.layer_types):
            own: Any = copy.copy(config)
            own.rope_parameters = config.rope_parameters[kind]
            self.by_type[kind] = RotaryEmbedding(own)

    def forward(self, x: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``cos`` and ``sin`` as :class:`RotaryEmbedding` does, by type of layers."""
        return {kind: rotary(x, position_ids) for kind, rotary in self.by_type.items()}


def build_rotary(config: MoezooConfig) -> RotaryEmbedding | RotaryByType | None:
    """Build what a model turns its queries and keys by; None where positions are learned."""
    if config.positions == "learned":
        return None
    if any(kind in config.rope_parameters for kind in config.layer_types):
        return RotaryByType(config)
    return RotaryEmbedding(config)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x``, ``(batch, heads, sequence, head_dim)``, by the angles of its positions.

    Where there are fewer angles than dimensions, the remaining ones stay as they are.
    """
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + quarter_turn * sin.unsqueeze(1)


def halves(x: Tensor) -> Tensor:
    """Put the first of each two neighbours into the first half, ``(..., turned)``.

    :func:`rotate` then turns neighbours together, as in RoFormer and DeepSeek, where it turns two
    halves of a Llama's.
    """
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2)
