"""What a mixture of ours would be as each stock format: its configuration.

Whether that format computes the same is decided by :mod:`moezoo_models.export.mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moezoo.errors import InputError
from moezoo.layers.dense import DenseFFN
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.router_input import FFN_INPUT
from moezoo_kernels.activations import PLAIN_GLU
from moezoo_models.checkpoints.dense import ACTIVATIONS
from moezoo_models.checkpoints.export import check_no_memories
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.latent_options import LatentAttentionOptions, latent_of

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
"""Fields that have the same name and meaning in every configuration."""


class Mixture:
    """What a mixture of ours has, for those that make configurations of it.

    Attributes:
        config: of the model.
        layer: its first mixture; the others have the same options.
        dense: numbers of the layers that are dense.
        width: of these, or of an expert where there are none.
        first: the number of dense layers, if they are the first ones; else None.
    """

    def __init__(self, model: MoezooForCausalLM) -> None:
        check_no_memories(model)
        self.config: MoezooConfig = model.config
        blocks = [cast(nn.Module, layer.mlp) for layer in model.model.layers]
        self.dense = [n for n, block in enumerate(blocks) if not isinstance(block, SparseMoE)]
        for number, block in enumerate(blocks):
            _check_kind(number, block)
        self.layer = next(block for block in blocks if isinstance(block, SparseMoE))
        for number, block in enumerate(blocks):
            _check_options(number, block, self.layer)
            if self.config.router_input(number) != FFN_INPUT:
                raise InputError(
                    f"checkpoint: the router of layer {number} reads what its experts do not "
                    "(router_input), in no stock format; keep it as it is"
                )
        widths = {cast(DenseFFN, blocks[n]).d_ff for n in self.dense}
        if len(widths) > 1:
            raise InputError(
                f"checkpoint: its dense layers are {sorted(widths)} wide, and in stock mixtures "
                "all have one width; keep it as it is"
            )
        self.width = widths.pop() if widths else self.layer.d_expert
        leading = self.dense == list(range(len(self.dense)))
        self.first = len(self.dense) if leading else None

    @property
    def slides(self) -> bool:
        """Whether any layer attends to a window."""
        return "sliding_attention" in self.config.layer_types

    @property
    def activation(self) -> str:
        """transformers' name of the activation."""
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return names[self.layer.activation]


def _check_kind(number: int, block: nn.Module) -> None:
    if type(block) not in (SparseMoE, DenseFFN):
        raise InputError(
            f"checkpoint: layer {number} is a {type(block).__name__}, in no stock format; keep it "
            "as it is"
        )


def _check_options(number: int, block: nn.Module, first: SparseMoE) -> None:
    if isinstance(block, DenseFFN):
        plain = block.gated and not block.bias and block.glu == PLAIN_GLU
        if not plain or block.activation != first.activation:
            raise InputError(
                f"checkpoint: layer {number} is a dense block with biases, bounds, another "
                "activation or no gate, in no stock mixture; keep it as it is"
            )
    elif cast(SparseMoE, block).config() != first.config():
        raise InputError(
            f"checkpoint: layer {number} has other options than the first mixture, and in stock "
            "formats all have the same; keep it as it is"
        )


def _common(mixture: Mixture, **fields: Any) -> dict[str, Any]:
    config = mixture.config
    own = {name: getattr(config, name) for name in _SAME}
    own["rope_parameters"] = dict(config.rope_parameters)
    if config.trained_length is not None:
        own["trained_length"] = config.trained_length
    top_k = mixture.layer.top_k
    return {**own, "hidden_act": mixture.activation, "num_experts_per_tok": top_k, **fields}


def _mixtral(mixture: Mixture) -> Any:
    return MixtralConfig(
        **_common(
            mixture,
            head_dim=mixture.config.head_dim,
            intermediate_size=mixture.layer.d_expert,
            num_local_experts=mixture.layer.num_experts,
            sliding_window=mixture.config.sliding_window if mixture.slides else None,
        )
    )


def _qwen(mixture: Mixture) -> dict[str, Any]:
    return _common(
        mixture,
        intermediate_size=mixture.width,
        moe_intermediate_size=mixture.layer.d_expert,
        num_experts=mixture.layer.num_experts,
        norm_topk_prob=mixture.layer.router.normalize,
        decoder_sparse_step=1,
        mlp_only_layers=mixture.dense,
        use_sliding_window=False,
    )


def _qwen2_moe(mixture: Mixture) -> Any:
    return Qwen2MoeConfig(
        **_qwen(mixture),
        qkv_bias=mixture.config.attention_bias,
        shared_expert_intermediate_size=mixture.layer.d_shared,
    )


def _qwen3_moe(mixture: Mixture) -> Any:
    make: Callable[..., Any] = Qwen3MoeConfig  # the width of heads is not in its signature
    return make(
        **_qwen(mixture),
        head_dim=mixture.config.head_dim,
        attention_bias=mixture.config.attention_bias,
        sliding_window=None,
    )


def _glm4_moe(mixture: Mixture) -> Any:
    layer, config = mixture.layer, mixture.config
    made: Any = Glm4MoeConfig(
        **_common(
            mixture,
            intermediate_size=mixture.width,
            moe_intermediate_size=layer.d_expert,
            n_routed_experts=layer.num_experts,
            n_shared_experts=layer.d_shared // layer.d_expert,
            routed_scaling_factor=layer.router.scale,
            norm_topk_prob=layer.router.normalize,
            n_group=layer.router.num_groups,
            topk_group=layer.router.top_groups,
            first_k_dense_replace=mixture.first or 0,
            head_dim=config.head_dim,
            attention_bias=config.attention_bias,
            use_qk_norm=config.qk_norm,
            num_mtp_layers=0,
            partial_rotary_factor=1.0,
        )
    )
    made.rope_parameters = {**made.rope_parameters, "partial_rotary_factor": 1.0}
    return made


def _granitemoe(mixture: Mixture) -> Any:
    config = mixture.config
    return GraniteMoeConfig(
        **_common(
            mixture,
            intermediate_size=mixture.layer.d_expert,
            num_local_experts=mixture.layer.num_experts,
            attention_bias=config.attention_bias,
            attention_multiplier=float(config.head_dim or 1) ** -0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        )
    )


def _deepseek(mixture: Mixture, **fields: Any) -> dict[str, Any]:
    """Return what both DeepSeeks have; latent attention of any widths where the model has none."""
    layer, config = mixture.layer, mixture.config
    latent = latent_of(config) or LatentAttentionOptions()
    return _common(
        mixture,
        intermediate_size=mixture.width,
        moe_intermediate_size=layer.d_expert,
        n_routed_experts=layer.num_experts,
        n_shared_experts=layer.d_shared // layer.d_expert,
        routed_scaling_factor=layer.router.scale,
        n_group=layer.router.num_groups,
        topk_group=layer.router.top_groups,
        first_k_dense_replace=mixture.first or 0,
        attention_bias=config.attention_bias,
        kv_lora_rank=latent.kv_lora_rank,
        q_lora_rank=latent.q_lora_rank,
        qk_nope_head_dim=latent.qk_nope_head_dim,
        qk_rope_head_dim=latent.qk_rope_head_dim,
        v_head_dim=latent.v_head_dim,
        **fields,
    )


def _deepseek_v2(mixture: Mixture) -> Any:
    grouped = mixture.layer.router.num_groups > 1
    method = "group_limited_greedy" if grouped else "greedy"
    # The router reads no norm_topk_prob; published configurations have false.
    return DeepseekV2Config(**_deepseek(mixture, topk_method=method, norm_topk_prob=False))


def _deepseek_v3(mixture: Mixture) -> Any:
    latent = latent_of(mixture.config) or LatentAttentionOptions()
    return DeepseekV3Config(
        **_deepseek(
            mixture,
            norm_topk_prob=mixture.layer.router.normalize,
            rope_interleave=latent.rope_interleave,
            num_mtp_layers=0,
        )
    )


CANDIDATES: dict[str, Callable[[Mixture], Any]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "glm4_moe": _glm4_moe,
    "granitemoe": _granitemoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}

_LATENT: dict[str, Any] = {
    "latent": True,
    "bias": "all",
    "norm": None,
    "window": False,
    "head_dim": True,
    "dense": "first",
}

ATTENTION: dict[str, dict[str, Any]] = {
    "mixtral": {"bias": None, "norm": None, "window": True, "head_dim": True, "dense": None},
    "qwen3_moe": {
        "bias": "all",
        "norm": "always",
        "window": False,
        "head_dim": True,
        "dense": "any",
    },
    "qwen2_moe": {"bias": "qkv", "norm": None, "window": False, "head_dim": False, "dense": "any"},
    "glm4_moe": {"bias": "qkv", "norm": "any", "window": False, "head_dim": True, "dense": "first"},
    "granitemoe": {"bias": "all", "norm": None, "window": False, "head_dim": False, "dense": None},
    "deepseek_v2": _LATENT | {"interleave": True},
    "deepseek_v3": _LATENT,
}
"""Of each: which projections of attention may have biases, whether queries and keys have norms,
whether windows slide, whether the width of heads is free, and which layers may be dense; and of
latent attention, whether neighbours have to be turned together."""
