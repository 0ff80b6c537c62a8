"""Stock mixtures of transformers as ours, to be decoded: the same tensors in another module.

`moezoo carve` writes GLM-4.5's mixture by default, whose blocks a :class:`moezoo.SparseMoE` with
a shared expert computes. Nothing is copied: the two are one model for as long as a text takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Glm4MoeForCausalLM, PreTrainedModel

from moezoo_models.adapters.torch import has_forward_hooks
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.rotary import RotaryEmbedding

_THEIRS = (Glm4MoeForCausalLM.__module__, "torch.nn.modules", "transformers.activations")
"""Where the classes of a model's parts are that are what their weights say."""

_RENAMED = {"e_score_correction_bias": "selection_bias", "shared_experts": "shared_expert"}

_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def as_ours(model: PreTrainedModel) -> MoezooForCausalLM | None:
    """Return a stock mixture as ours, of the same tensors; None where its own code decodes it.

    Args:
        model: any, on any device.
    """
    if type(model) is not Glm4MoeForCausalLM or model.training or not _is_known(model.config):
        return None
    if attention_backend(model.config) != "sdpa" or not all(map(_is_itself, model.modules())):
        return None
    config: Any = model.config
    rope = {key: config.rope_parameters[key] for key in ("rope_type", "rope_theta")}
    given = {name: getattr(config, name) for name in _COPIED}
    ours = MoezooConfig(
        **given, qk_norm=config.use_qk_norm, rope_parameters=rope, ffn=_blocks(config)
    )
    with torch.device("meta"):
        made = MoezooForCausalLM(ours)
    made.load_state_dict(
        {_renamed(name): tensor for name, tensor in model.state_dict().items()}, assign=True
    )
    with torch.device(model.device):
        made.model.rotary_emb = RotaryEmbedding(ours)
    return made.eval()


def _is_known(config: Any) -> bool:
    """Return whether our decoder has all that a configuration asks for."""
    rope = config.rope_parameters
    return (
        config.n_group == 1
        and config.num_experts_per_tok > 1
        and config.n_shared_experts > 0
        and config.hidden_act == "silu"
        and rope["rope_type"] == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


def _is_itself(module: nn.Module) -> bool:
    """Return whether a part is of a known class, and nobody changes or watches its calls."""
    known = type(module).__module__.startswith(_THEIRS)
    return known and "forward" not in vars(module) and not has_forward_hooks(module)


def _blocks(config: Any) -> list[dict[str, Any]]:
    """Describe the blocks: the first ones may be dense."""
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    mixture = {
        "num_experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "d_expert": config.moe_intermediate_size,
        "num_shared_experts": config.n_shared_experts,
        "router": {
            "score": "sigmoid",
            "normalize": bool(config.norm_topk_prob),
            "scale": float(config.routed_scaling_factor),
            "selection_bias": True,
        },
        "balance": {"load_balancing": 0.0},
    }
    rules: list[dict[str, Any]] = [
        {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": mixture}
    ]
    if dense:
        width = {"d_ff": config.intermediate_size}
        numbers = list(range(min(dense, layers)))
        rules.append({"layers": numbers, "class_path": "moezoo.DenseFFN", "init_args": width})
    return rules


def _renamed(name: str) -> str:
    return ".".join(_RENAMED.get(part, part) for part in name.split("."))
