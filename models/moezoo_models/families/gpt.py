"""Plain MLPs and LayerNorm, with biases: StarCoder2 (arXiv:2402.19173), GPT-2 and OPT
(arXiv:2205.01068).

Dropout of embeddings and of what is added to the residual stream is theirs in training only, and
not taken over.
"""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, OPTConfig, Starcoder2Config

from moezoo_models.families.family import Family, activation, refuse
from moezoo_models.files.layout import Rule


def _starcoder2(config: Any) -> dict[str, Any]:
    return {
        "norm": "layer",
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.use_bias,
        "attention_output_bias": config.use_bias,
        "sliding_window": config.sliding_window,
    }


def _starcoder2_block(config: Any) -> dict[str, Any]:
    return _mlp(config.intermediate_size, "hidden_act", config.hidden_act, config.use_bias)


def _starcoder2_layout(_: Any) -> tuple[Rule, ...]:
    names = {"c_fc": "up_proj", "c_proj": "down_proj"}
    return tuple(
        Rule(rf"(model\.layers\.\d+\.mlp)\.{theirs}\.(weight|bias)", (rf"\1.{ours}.\2",))
        for theirs, ours in names.items()
    )


def _mlp(width: int, field: str, theirs: str, bias: bool) -> dict[str, Any]:
    return {"d_ff": width, "activation": activation(field, theirs), "gated": False, "bias": bias}


def _learned(bias: bool, eps: float) -> dict[str, Any]:
    """Describe learned positions, LayerNorm, and biases in all of attention or none."""
    return {
        "positions": "learned",
        "norm": "layer",
        "rms_norm_eps": eps,
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def _gpt2(config: Any) -> dict[str, Any]:
    refuse(
        config,
        {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        "is no option of this decoder; only models without it can be read",
    )
    return {
        **_learned(True, config.layer_norm_epsilon),
        "attention_multiplier": None if config.scale_attn_weights else 1.0,
        "attention_dropout": config.attn_pdrop,
    }


def _gpt2_block(config: Any) -> dict[str, Any]:
    width = 4 * config.n_embd if config.n_inner is None else config.n_inner
    return _mlp(width, "activation_function", config.activation_function, True)


def _gpt2_layout(config: Any) -> tuple[Rule, ...]:
    """Turn matrices that are stored as ``(in, out)``, and split queries, keys and values."""
    start, kind, width = r"(?:transformer\.)?", r"(weight|bias)", config.n_embd
    block, ours = start + r"h\.(\d+)\.", r"model.layers.\1."
    attention = tuple(rf"{ours}self_attn.{each}_proj.\2" for each in "qkv")
    return (
        Rule(start + r"wte\.weight", ("model.embed_tokens.weight",)),
        Rule(start + r"wpe\.weight", ("model.embed_positions.weight",)),
        Rule(start + rf"ln_f\.{kind}", (r"model.norm.\1",)),
        # Causal masks, which old versions of transformers saved.
        Rule(block + r"attn\.(?:masked_)?bias", ()),
        Rule(block + rf"ln_1\.{kind}", (ours + r"input_layernorm.\2",)),
        Rule(block + rf"ln_2\.{kind}", (ours + r"post_attention_layernorm.\2",)),
        Rule(block + rf"attn\.c_attn\.{kind}", attention, (width,) * 3, transposed=True),
        Rule(block + rf"attn\.c_proj\.{kind}", (ours + r"self_attn.o_proj.\2",), transposed=True),
        Rule(block + rf"mlp\.c_fc\.{kind}", (ours + r"mlp.up_proj.\2",), transposed=True),
        Rule(block + rf"mlp\.c_proj\.{kind}", (ours + r"mlp.down_proj.\2",), transposed=True),
    )


def _opt(config: Any) -> dict[str, Any]:
    refuse(
        config,
        {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": config.hidden_size,
        },
        "is no option of this decoder; only OPT models of other sizes than 350m can be read",
    )
    return {
        **_learned(config.enable_bias, 1e-5),
        "initializer_range": config.init_std,
    }


def _opt_block(config: Any) -> dict[str, Any]:
    return _mlp(
        config.ffn_dim, "activation_function", config.activation_function, config.enable_bias
    )


def _opt_layout(config: Any) -> tuple[Rule, ...]:
    """Rename; the first two positions are never used."""
    start, kind = r"(?:model\.)?decoder\.", r"(weight|bias)"
    block, ours = start + r"layers\.(\d+)\.", r"model.layers.\1."
    count = config.max_position_embeddings
    positions = Rule(
        start + r"embed_positions\.weight", ("model.embed_positions.weight",), (count,), first=2
    )
    return (
        Rule(start + r"embed_tokens\.weight", ("model.embed_tokens.weight",)),
        positions,
        Rule(start + rf"final_layer_norm\.{kind}", (r"model.norm.\1",)),
        Rule(block + rf"self_attn_layer_norm\.{kind}", (ours + r"input_layernorm.\2",)),
        Rule(block + rf"final_layer_norm\.{kind}", (ours + r"post_attention_layernorm.\2",)),
        Rule(block + rf"self_attn\.([qkv])_proj\.{kind}", (ours + r"self_attn.\2_proj.\3",)),
        Rule(block + rf"self_attn\.out_proj\.{kind}", (ours + r"self_attn.o_proj.\2",)),
        Rule(block + rf"fc1\.{kind}", (ours + r"mlp.up_proj.\2",)),
        Rule(block + rf"fc2\.{kind}", (ours + r"mlp.down_proj.\2",)),
    )


# Files of the model without its head; those of GPT-2 hold causal masks, too.
_OLDER_GPT2 = (
    Rule(r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias", ()),
    Rule(r"((?:wte|wpe|h|ln_f)\..*)", (r"transformer.\1",)),
)
_OLDER_OPT = (Rule(r"(decoder\..*)", (r"model.\1",)),)

FAMILIES = {
    "starcoder2": Family(Starcoder2Config, _starcoder2, _starcoder2_block, _starcoder2_layout),
    "gpt2": Family(GPT2Config, _gpt2, _gpt2_block, _gpt2_layout, _OLDER_GPT2),
    "opt": Family(OPTConfig, _opt, _opt_block, _opt_layout, _OLDER_OPT),
}
