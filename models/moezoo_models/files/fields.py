"""The fields of a ``config.json`` that architectures share: kinds, ranges, and how they fit.

The file was written by others: a string where a switch should be counts as true, a
negative width fails somewhere deep inside, and a layer count without end never returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from moezoo.errors import InputError, check_choice, check_int, check_number

FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""The dtypes that a model can have, by name."""

MOST_LAYERS = 1 << 16
LARGEST_SIZE = (1 << 31) - 1

STEERING = (
    "attn_implementation",
    "auto_map",
    "distributed_config",
    "fusion_config",
    "kernel_config",
    "per_layer_config",
    "transformers_weights",
)
"""Keys by which a configuration would make transformers load files or code, or patch classes."""

_Check = Callable[[str, Any], object]


def _flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{field}: {_shown(value)} is not true or false")


def _text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{field}: {_shown(value)} is not text")


def _texts(field: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{field}: {_shown(value)} is not a list of names")


def _mapping(field: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{field}: {_shown(value)} is not a mapping")


def _dtype(field: str, value: Any) -> None:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    _text(field, value)
    check_choice(field, value, FLOATS)


def _positive(field: str, value: Any, maximum: float | None = None) -> None:
    if check_number(field, value, maximum=maximum) == 0:
        raise InputError(f"{field}: 0 is out of range; give a number > 0")


def _numbers(field: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{field}: {_shown(value)} is not a list of numbers")
    for each in value:
        _positive(field, each)


def _tokens(field: str, value: Any) -> None:
    for each in value if isinstance(value, list) else [value]:
        # Published configurations have -1 for "no such token".
        check_int(field, each, minimum=-1, maximum=LARGEST_SIZE)


def _labels(field: str, value: Any) -> None:
    _mapping(field, value)
    for key in value:
        if not (isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdigit())):
            raise InputError(f"{field}: {_shown(key)} is not the number of a label")


def _decoder(field: str, value: Any) -> None:
    _flag(field, value)
    if value:
        raise InputError(f"{field}: only decoders are read here; set it to false")


def _layers(field: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise InputError(f"{field}: {_shown(value)} is not a list of layers' numbers")
    for each in value:
        check_int(field, each, minimum=0, maximum=MOST_LAYERS)


def _optional(check: _Check) -> _Check:
    return lambda field, value: None if value is None else check(field, value)


_SIZE = partial(check_int, maximum=LARGEST_SIZE)
_COUNT = partial(check_int, minimum=0, maximum=LARGEST_SIZE)
_SHARE = partial(check_number, maximum=1.0)

_ROPE: dict[str, _Check] = {
    "rope_type": _text,
    "type": _text,
    "rope_theta": _positive,
    "factor": _positive,
    "low_freq_factor": _positive,
    "high_freq_factor": _positive,
    "attention_factor": _optional(_positive),
    "beta_fast": _optional(_positive),
    "beta_slow": _optional(_positive),
    "mscale": _optional(check_number),
    "mscale_all_dim": _optional(check_number),
    "partial_rotary_factor": partial(_positive, maximum=1.0),
    "original_max_position_embeddings": _SIZE,
    "short_factor": _numbers,
    "long_factor": _numbers,
    "truncate": _flag,
}


def check_rope(field: str, parameters: Any) -> None:
    """Check the kinds and ranges of what describes rotary embeddings, of all layers or of a type.

    Raises:
        InputError: names the parameter.
    """
    _mapping(field, parameters)
    for name, value in parameters.items():
        if name in _ROPE:
            _ROPE[name](f"{field}: {name}", value)
        elif name.endswith("_attention") and value is not None:
            check_rope(f"{field}: {name}", value)


_FIELDS: dict[str, _Check] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size"), _SIZE
    ),
    **dict.fromkeys(("num_attention_heads", "moe_intermediate_size", "num_experts"), _SIZE),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts_per_tok"), _SIZE),
    "num_hidden_layers": partial(check_int, maximum=MOST_LAYERS),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts"), _COUNT),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), _optional(_SIZE)),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"), _SIZE),
    "q_lora_rank": _optional(_SIZE),
    "latent_attention": _optional(_mapping),
    "sliding_window": _optional(_COUNT),  # published configurations have 0 for none
    **dict.fromkeys(
        (
            "allow_non_causal",
            "attention_bias",
            "attention_output_bias",
            "mlp_bias",
            "norm_topk_prob",
            "output_router_logits",
            "qk_norm",
            "qkv_bias",
            "tie_word_embeddings",
            "rope_interleave",
            "use_cache",
            "use_qk_norm",
            "use_sliding_window",
        ),
        _flag,
    ),
    "rms_norm_eps": _SHARE,
    "rope_theta": _optional(_positive),
    "attention_dropout": _optional(_SHARE),
    "initializer_range": check_number,
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), _positive),
    **dict.fromkeys(
        ("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping"),
        _optional(_positive),
    ),
    **dict.fromkeys(("norm", "norm_placement", "parallel", "positions", "qk_norm_over"), _text),
    "nope_layers": _layers,
    "partial_rotary_factor": partial(_positive, maximum=1.0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), _optional(_tokens)),
    **dict.fromkeys(("dtype", "torch_dtype"), _optional(_dtype)),
    **dict.fromkeys(("architectures", "layer_types", "mlp_layer_types"), _optional(_texts)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _optional(check_rope)),
    "id2label": _optional(_labels),
    **dict.fromkeys(("attention_experts", "label2id"), _optional(_mapping)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), _optional(_flag)),
    "is_encoder_decoder": _optional(_decoder),
    "chunk_size_feed_forward": _optional(_COUNT),
    "num_labels": _optional(partial(check_int, minimum=0, maximum=MOST_LAYERS)),
    "model_type": _text,
    "hidden_act": _text,
    "experts_implementation": _optional(_text),
    "transformers_version": _optional(_text),
}


def check_fields(raw: Mapping[str, Any]) -> None:
    """Check kinds and ranges of the fields that are there.

    Args:
        raw: fields of any architecture's configuration, by name.

    Raises:
        InputError: names the first that is wrong.
    """
    for name, value in raw.items():
        if check := _FIELDS.get(name):
            check(name, value)
    if raw.get("quantization_config"):
        raise InputError("quantization_config: quantised weights cannot be loaded; dequantise them")


def check_heads(config: Any) -> None:
    """See that the heads of attention, and the experts of a mixture, fit together.

    Args:
        config: of any architecture, with the fields of a Llama, or some of them.

    Raises:
        InputError: names the field and the fix.
    """
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if width is None or heads is None:
        return
    if getattr(config, "head_dim", None) is None and width % heads:
        raise InputError(
            f"hidden_size: {width} is not divisible by num_attention_heads {heads}; "
            "make it a multiple, or set head_dim"
        )
    head_dim = getattr(config, "head_dim", None) or width // heads
    if head_dim % 2:
        raise InputError(
            f"head_dim: {head_dim} is odd, which rotary embeddings cannot halve; "
            "change num_attention_heads or head_dim"
        )
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise InputError(
            f"num_key_value_heads: {groups} does not divide num_attention_heads {heads}; "
            "choose a divisor"
        )
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    slides = slides or getattr(config, "model_type", None) in ("mistral", "mixtral")
    if slides and getattr(config, "sliding_window", None) == 0:
        raise InputError("sliding_window: 0 is out of range; give a whole number ≥ 1, or null")
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if chosen is not None and experts is not None:
            check_int("num_experts_per_tok", chosen, maximum=experts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
