"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split as in Llama.

Scaled variants (linear, dynamic, yarn, llama3, ...) are transformers' own: ``rope_parameters`` in
the model's configuration means here what it means there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
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
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        """Compute the ``(head_dim / 2,)`` angular frequencies and the factor on cos and sin."""
        if self.rope_type == "default":
            config = self.config
            head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
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
        """Return ``cos`` and ``sin``, ``(batch, sequence, head_dim)``, in the dtype of ``x``."""
        # fp32 whatever autocast says: bf16 cannot tell position 1000 from 1001.
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x``, ``(batch, heads, sequence, head_dim)``, by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + quarter_turn * sin.unsqueeze(1)
