"""Which models the decoder steps, and why it leaves others to transformers' ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moezoo_kernels.linear import is_plain_linear
from moezoo_models.adapters.torch import has_forward_hooks
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.attention import Attention
from moezoo_models.model.block import DecoderLayer
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.decoder import MoezooModel
from moezoo_models.model.head import Head
from moezoo_models.model.llama import beyond_llama
from moezoo_models.model.norm import RMSNorm
from moezoo_models.model.rotary import RotaryEmbedding

_BEYOND_LLAMA = ("parallel", "memory", "qk_norm_over", "rope_parameters")
"""Fields of which the steps know more than a Llama has; turned parts of heads among them."""

_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def ineligible(model: PreTrainedModel) -> str | None:
    """Return why a model is not decoded by :class:`Decoder`; None if it is.

    | what | why not |
    | --- | --- |
    | a stock model of transformers | its own ``generate`` knows it |
    | a subclass, or a part that was replaced (LoRA) or given another ``forward`` | its weights alone do not say what it computes |
    | forward hooks | somebody watches the calls, which the decoder does not make |
    | an attention backend other than ``sdpa`` | it was asked for |
    | training mode | dropout and noise |
    | autocast | its casts would be repeated at each step |
    | weights in parts over processes, or on several devices | the parts are gathered by hooks |
    | projections of different dtypes | they are multiplied as one |
    | norms, positions, factors, soft caps or latents that are no Llama's | the steps do not know them |
    """  # noqa: E501
    if type(model) is not MoezooForCausalLM:
        return f"{type(model).__name__} is not this library's model"
    if model.training:
        return "the model is in training mode"
    if (backend := attention_backend(model.config)) != "sdpa":
        return f"its attention backend is {backend}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if (field := beyond_llama(model.config, _BEYOND_LLAMA)) is not None:
        return f"its {field} is not a Llama's"
    return _replaced(model) or _spread(model)


def turns_anew(config: Any, length: int, new_tokens: int) -> bool:
    """Return whether a text grows past the length at which longrope turns all its keys anew.

    Args:
        config: of a model that is stepped otherwise.
        length: tokens of the prompt.
        new_tokens: at most so many follow.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return False
    return length <= int(rope["original_max_position_embeddings"]) < length + new_tokens


def _replaced(model: MoezooForCausalLM) -> str | None:
    """Name the first part that does not compute what its weights say."""
    expected: dict[str, type[nn.Module]] = {
        "model": MoezooModel,
        "lm_head": Head,
        "model.embed_tokens": nn.Embedding,
        "model.norm": RMSNorm,
        "model.rotary_emb": RotaryEmbedding,
    }
    norm = RMSNorm if model.config.qk_norm else nn.Identity
    maps: set[str] = set()
    for number, block in enumerate(model.model.blocks()):
        here = f"model.layers.{number}"
        expected |= {here: DecoderLayer, f"{here}.self_attn": Attention}
        expected |= {f"{here}.{name}": RMSNorm for name in block.places if name is not None}
        expected |= {f"{here}.self_attn.{part}": norm for part in ("q_norm", "k_norm")}
        maps |= {f"{here}.self_attn.{part}" for part in _ATTENTION_PARTS}
    for name, module in model.named_modules():
        replaced = name in maps and not is_plain_linear(module)
        if replaced or type(module) is not expected.get(name, type(module)):
            return f"{name} is a {type(module).__name__}"
        if hasattr(module, "base_layer"):
            return f"{name} is adapted"
        if "forward" in vars(module):
            return f"{name} has another forward"
        if has_forward_hooks(module):
            return f"{name or 'it'} has forward hooks"
    return None


def _spread(model: MoezooForCausalLM) -> str | None:
    """Return which weight is sharded, on another device or of another dtype; None if none is."""
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.device != model.device:
            return f"{name} is not whole on {model.device}"
        if ".self_attn." in name and parameter.dtype != model.dtype:
            return f"{name} is not in {model.dtype}"
    return None
