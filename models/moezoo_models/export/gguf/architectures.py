"""The architectures that llama.cpp computes as transformers does: their keys, and what is refused.

Each was compared with llama.cpp (``tests/models/export/gguf/test_llama_cpp.py``): the same greedy
tokens, and log-probabilities that differ by rounding. What it would compute differently without a
word is refused here, by the field that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moezoo.errors import InputError
from moezoo_models.families.unknown import instead

SIGMOID = 2
"""llama.cpp's number of a router whose scores are sigmoids."""

Keys = dict[str, Any]

_LLAMAS = ("llama", "mistral", "mixtral")

_PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows an architecture of transformers.

    Attributes:
        name: its name in a GGUF file.
        keys: those of a configuration that not all architectures have.
        check: raises :class:`InputError` for what llama.cpp would compute otherwise.
        permuted: whether rows of queries and keys that are rotated together are neighbours, and not
            half a head apart as in transformers.
        norms: names in the file of a block's norms, by transformers' names.
        needs_head: whether a head that is tied to the embeddings is to be written all the same.
        needs_shared: whether a shared expert has to be there.
    """

    name: str
    keys: Callable[[Any], Keys]
    check: Callable[[Any], None]
    permuted: bool = False
    norms: Mapping[str, str] | None = None
    needs_head: bool = False
    needs_shared: bool = False

    def norm(self, theirs: str) -> str | None:
        """Return the name in the file of a block's norm; None if it is none."""
        return (self.norms or _PRE).get(theirs)


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a configuration of transformers that llama.cpp computes.

    Raises:
        InputError: it computes none such, or not with these fields.
    """
    kind = str(config.model_type)
    if kind in _REFUSED:
        raise InputError(f"model_type: {_REFUSED[kind]}")
    if kind not in ARCHITECTURES:
        raise InputError(f"model_type: '{kind}' has no GGUF export{instead(kind, ARCHITECTURES)}")
    found = ARCHITECTURES[kind]
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(
            f"hidden_act: llama.cpp computes silu where this model has '{config.hidden_act}'; "
            "serve it with transformers"
        )
    _check_windows(config)
    _check_rope(config)
    found.check(config)
    return found


def keys_of(config: Any) -> Keys:
    """Return the keys of a configuration, without the architecture's name before them."""
    head_dim, rope = head_dim_of(config), config.rope_parameters
    rotary = round(head_dim * float(rope.get("partial_rotary_factor", 1.0)))
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": rotary,
        "vocab_size": config.vocab_size,
    }
    return common | _rope_scaling(config) | ARCHITECTURES[config.model_type].keys(config)


def head_dim_of(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_experts_of(config: Any) -> int:
    """Return the number of routed experts, 0 of a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((getattr(config, n) for n in names if getattr(config, n, None)), 0)


def _check_windows(config: Any) -> None:
    """Refuse a window that llama.cpp, which attends to all positions here, would not have."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None if kinds is None else "sliding_attention" in kinds
    if slides and window < config.max_position_embeddings:
        raise InputError(
            f"sliding_window: llama.cpp would attend to all of {config.max_position_embeddings} "
            f"positions, and not to {window}; lower max_position_embeddings to {window}, or serve "
            "it with transformers"
        )


def _check_rope(config: Any) -> None:
    kind = config.rope_parameters.get("rope_type", "default")
    known = ("default", "linear", "llama3") if config.model_type in _LLAMAS else ("default",)
    if kind not in known:
        raise InputError(
            f"rope_parameters: rope_type '{kind}' of a {config.model_type} was not compared with "
            f"llama.cpp's; it has to be {' or '.join(known)}"
        )


def _rope_scaling(config: Any) -> Keys:
    """Return the keys of positions that are divided by a number; llama3's is a tensor."""
    if config.rope_parameters.get("rope_type") != "linear":
        return {}
    factor = float(config.rope_parameters["factor"])
    return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}


def _refuse_bias(config: Any, name: str) -> None:
    if getattr(config, "attention_bias", False):
        raise InputError(
            f"attention_bias: llama.cpp's {name} has no such biases, and dropping them would "
            "change the model; serve it with transformers"
        )


def _refuse_dense_layers(config: Any) -> None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise InputError(
            "mlp_only_layers: llama.cpp has no dense layers between those with experts; convert "
            "all layers, or to glm4_moe, whose first ones may be dense"
        )


def _refuse_raw_weights(config: Any) -> None:
    if not config.norm_topk_prob:
        raise InputError(
            "norm_topk_prob: llama.cpp divides the weights of the chosen experts by their sum; "
            "serve it with transformers"
        )


def _check_nothing(config: Any) -> None:
    return


def _check_qwen3_moe(config: Any) -> None:
    _refuse_bias(config, "qwen3moe")
    _refuse_dense_layers(config)
    _refuse_raw_weights(config)


def _check_glm4_moe(config: Any) -> None:
    for name in ("n_group", "topk_group"):
        if (groups := getattr(config, name, 1) or 1) != 1:
            raise InputError(
                f"{name}: choosing within {groups} groups of experts was not compared with "
                "llama.cpp's; serve it with transformers"
            )
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    if dense >= layers:
        raise InputError(
            f"first_k_dense_replace: {dense} of {layers} layers leave none with experts; export "
            "it as a dense model"
        )


def _no_keys(config: Any) -> Keys:
    return {}


def _mixture(config: Any) -> Keys:
    return {
        "expert_count": num_experts_of(config),
        "expert_used_count": config.num_experts_per_tok,
    }


def _qwen3_moe(config: Any) -> Keys:
    return _mixture(config) | {"expert_feed_forward_length": config.moe_intermediate_size}


def _glm4_moe(config: Any) -> Keys:
    return _qwen3_moe(config) | {
        "expert_shared_count": max(config.n_shared_experts, 1),
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _granitemoe(config: Any) -> Keys:
    return _mixture(config) | {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


_POST = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PERMUTED: dict[str, Any] = {"permuted": True}

ARCHITECTURES = {
    "llama": Architecture("llama", _no_keys, _check_nothing, **_PERMUTED),
    "mistral": Architecture("llama", _no_keys, _check_nothing, **_PERMUTED),
    "mixtral": Architecture("llama", _mixture, _check_nothing, **_PERMUTED),
    "qwen2": Architecture("qwen2", _no_keys, _check_nothing),
    "qwen3": Architecture("qwen3", _no_keys, lambda config: _refuse_bias(config, "qwen3")),
    "qwen3_moe": Architecture("qwen3moe", _qwen3_moe, _check_qwen3_moe),
    "olmo2": Architecture(
        "olmo2",
        _no_keys,
        lambda config: _refuse_bias(config, "olmo2"),
        norms=_POST,
        needs_head=True,
    ),
    "glm4_moe": Architecture(
        "glm4moe",
        _glm4_moe,
        _check_glm4_moe,
        norms={"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
        needs_shared=True,
    ),
    "granitemoe": Architecture("granitemoe", _granitemoe, _check_nothing, **_PERMUTED),
}
"""By transformers' ``model_type``."""

_REFUSED = {
    "qwen2_moe": "llama.cpp's qwen2moe weighs the shared expert otherwise than transformers (a "
    "gate of zero gives NaN); convert to glm4_moe instead",
    "flex_olmo": "llama.cpp does not know flex_olmo; convert a model of another family, or serve "
    "it with transformers",
}
