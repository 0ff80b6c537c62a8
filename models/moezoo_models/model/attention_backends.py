"""The ways to compute attention, registered with transformers' attention interface.

Each takes ``query (batch, heads, queries, head_dim)``, ``key`` and ``value (batch, kv_heads, keys,
head_dim)`` and a mask as its mask function made it, and returns ``(batch, queries, heads,
head_dim)`` with the attention weights or None.

``flash_attention_2`` and ``flex_attention`` are transformers' own; ``sdpa`` is, too, except inside
autocast on a CPU, where it runs in fp32 because bf16 is slower there; ``xformers`` is added.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from moezoo.errors import InputError, check_choice

Attended = tuple[Tensor, Tensor | None]


def attention_backends() -> dict[str, str | None]:
    """Name every backend, with the reason why it cannot be used here; None where it can."""
    return {
        "eager": None,
        "sdpa": None,
        "flex_attention": None,
        "flash_attention_2": _flash_missing(),
        "xformers": xformers_missing(),
    }


def check_backend(name: str | None, softcap: float | None = None) -> None:
    """Refuse a backend that is unknown, that this machine cannot run, or that has no soft cap.

    Raises:
        InputError: with the reason.
    """
    if name is None:
        return
    backends = attention_backends()
    check_choice("attention", name, backends)
    if reason := backends[name]:
        raise InputError(f"attention: '{name}' cannot be used here: {reason}; 'sdpa' can")
    if softcap is not None and name == "xformers":
        raise InputError(
            "attention: 'xformers' has no soft cap (attn_logit_softcapping); 'sdpa' has one"
        )


def _flash_missing() -> str | None:
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    return None


def xformers_missing() -> str | None:
    """Return why xformers cannot be used here; None if it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'moezoo[xformers]')"
    if not torch.cuda.is_available():
        return "xformers has no CPU operator and there is no CUDA device"
    return None


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeat each key or value head for the queries that share it."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> Attended:
    """Compute attention as written in the paper; the only backend that returns its weights."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_heads(key, groups).transpose(2, 3) * scaling
    if softcap is not None:
        scores = soft_capped(scores, softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ repeat_heads(value, groups)).transpose(1, 2).contiguous(), weights


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """Bound values smoothly: ``cap tanh(x / cap)`` (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Attended:
    """Call torch's scaled_dot_product_attention, in fp32 under autocast on a CPU.

    It knows no soft cap: with one, the scores are computed one by one.
    """
    if softcap is not None:
        key, value, bias = _with_bias(query, key, value, attention_mask)
        attended, _ = eager_attention(module, query, key, value, bias, softcap=softcap, **kwargs)
        return attended, None
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )


def _with_bias(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn sdpa's mask, bool or None, into numbers to add; return keys and values that are read.

    Without a mask, several queries are causal from the first key on; keys beyond them are those
    that an empty static cache has not been given yet.
    """
    queries = query.shape[2]
    if mask is None and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return key, value, mask
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return key, value, bias.masked_fill(~mask, torch.finfo(query.dtype).min)


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> Attended:
    """Call xformers' memory_efficient_attention.

    Raises:
        InputError: xformers is not installed, or there is no CUDA device.
    """
    check_backend("xformers")
    from xformers import ops

    queries, groups = query.shape[2], query.shape[1] // key.shape[1]
    bias: Any = None
    if attention_mask is not None:
        bias = _aligned_bias(attention_mask, query)
    elif queries > 1:
        # Without a mask there is nothing before the first query: only an empty static cache has
        # more keys than queries, and those beyond are unwritten.
        key, value = key[:, :, :queries], value[:, :, :queries]
        bias = ops.LowerTriangularMask()
    attended = ops.memory_efficient_attention(
        query.transpose(1, 2),
        repeat_heads(key, groups).transpose(1, 2),
        repeat_heads(value, groups).transpose(1, 2),
        attn_bias=bias,
        p=dropout,
        scale=scaling,
    )
    return attended, None


def _aligned_bias(mask: Tensor, query: Tensor) -> Tensor:
    """Turn a bool mask ``(batch, 1, queries, keys)`` into an additive bias with rows of 8 n.

    xformers asks that rows start at multiples of 8 elements. Masked entries get the least finite
    number, as a row of padding, masked throughout, must not become NaN.
    """
    batch, heads, queries, _ = query.shape
    keys = mask.shape[-1]
    bias = query.new_zeros(batch, 1, queries, -(-keys // 8) * 8)[..., :keys]
    bias.masked_fill_(~mask, torch.finfo(query.dtype).min)
    return bias.expand(batch, heads, queries, keys)


AttentionInterface.register("xformers", xformers_attention)
AttentionMaskInterface.register("xformers", sdpa_mask)

ATTENTION = AttentionInterface()
"""transformers' attention functions, with our own ``sdpa`` for this library's models only."""
ATTENTION["sdpa"] = sdpa_attention
