"""Options of multi-head latent attention, and what they say of a configuration's attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moezoo.arguments import as_options
from moezoo.errors import InputError, check_int

LATENT_EPS = 1e-6
"""Added to mean squares in the norms of latents, whatever ``rms_norm_eps`` is, as in DeepSeek's."""


@dataclass(frozen=True)
class LatentAttentionOptions:
    """Options of multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

    The defaults are those of DeepSeek-V2-Lite.

    Attributes:
        kv_lora_rank: width of the latent that the keys and values of all heads are made of, d_c.
        q_lora_rank: width of that of the queries, d'_c; None makes them of the hidden state.
        qk_nope_head_dim: width of a head's queries and keys without positions, d_h.
        qk_rope_head_dim: width of what rotary positions turn, beside that; even. Of the keys it is
            the same in all heads.
        v_head_dim: width of a head's values.
        rope_interleave: neighbours are turned together, as in DeepSeek's weights; false for the
            two halves, as in Llama's.
    """

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True

    def check(self) -> None:
        """Check the ranges.

        Raises:
            InputError: names the option and the fix.
        """
        for spec in fields(self):
            value, name = getattr(self, spec.name), f"latent_attention.{spec.name}"
            if spec.name == "rope_interleave":
                if not isinstance(value, bool):
                    raise InputError(f"{name}: {value!r} is not true or false")
            elif value is not None or spec.name != "q_lora_rank":
                check_int(name, value, maximum=(1 << 31) - 1)
        if self.qk_rope_head_dim % 2:
            raise InputError(
                f"latent_attention.qk_rope_head_dim: {self.qk_rope_head_dim} is odd, which rotary "
                "embeddings cannot halve; give an even number"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def scaling(self, rope: Mapping[str, Any]) -> float:
        """Return the factor on scores.

        Scaled kinds of rotary positions raise it by ``(0.1 mscale_all_dim log(factor) + 1)^2``
        (YaRN, arXiv:2309.00071, as DeepSeek-V2 applies it).

        Args:
            rope: the model's ``rope_parameters``.
        """
        scaling = self.qk_head_dim**-0.5
        raised, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
        if rope.get("rope_type", "default") != "default" and raised and factor > 1.0:
            scaling *= (0.1 * raised * math.log(factor) + 1.0) ** 2
        return scaling


def check_latent(given: Any) -> LatentAttentionOptions:
    """Return the options of a configuration, checked.

    Raises:
        InputError: they are no mapping; an option is unknown, or out of range.
    """
    options = as_options("latent_attention", given, LatentAttentionOptions)
    options.check()
    return options


def latent_of(config: Any) -> LatentAttentionOptions | None:
    """Return the options of a model's latent attention; None where its attention is another.

    Args:
        config: of ours, or of any architecture of transformers.
    """
    own = getattr(config, "latent_attention", None)
    if own is not None:
        return LatentAttentionOptions(**own)
    if getattr(config, "kv_lora_rank", None) is None:
        return None
    names = [spec.name for spec in fields(LatentAttentionOptions) if hasattr(config, spec.name)]
    return LatentAttentionOptions(**{name: getattr(config, name) for name in names})


def head_widths(config: Any) -> tuple[int, int]:
    """Return the widths of a head's queries and keys, and of its values.

    Args:
        config: of ours, or of any architecture of transformers.
    """
    if (latent := latent_of(config)) is not None:
        return latent.qk_head_dim, latent.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def cached_numbers(config: Any) -> int:
    """Return how many numbers a layer keeps of each earlier token.

    Args:
        config: as for :func:`head_widths`.
    """
    if (latent := latent_of(config)) is not None:
        return latent.kv_lora_rank + latent.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads) * sum(head_widths(config))
