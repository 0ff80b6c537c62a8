"""A mixture of ours as the stock one whose blocks compute the same, tensor for tensor.

What a stock block computes is read off it as for :func:`moezoo.adopt`: it is the options of a
SparseMoE. A stock architecture is the right one if these are the model's own; then each tensor of
ours is one of theirs, and logits are equal but for the order of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moezoo.errors import InputError
from moezoo.layers.dense import DenseFFN
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.router_input import FFN_INPUT
from moezoo_kernels.activations import PLAIN_GLU
from moezoo_models.adopt.layouts import as_it_is, flat
from moezoo_models.adopt.reading import entry_of, hold, mixtures_of
from moezoo_models.checkpoints.dense import ACTIVATIONS
from moezoo_models.checkpoints.export import check_no_memories, plain_state_dict
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig

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

_TRAINING = (
    "bias_recentre",
    "bias_rule",
    "bias_update_rate",
    "expert_dropout",
    "jitter",
    "jitter_experts",
    "rounding",
    "threshold_decay",
)
"""Options of a router that only say how it is trained."""


class _Mixture:
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


def as_stock_mixture(model: MoezooForCausalLM) -> PreTrainedModel:
    """Return the stock model that computes what a mixture of ours does, with its tensors.

    Raises:
        InputError: there is none; says which comes nearest, and what it has otherwise.
    """
    mixture = _Mixture(model)
    nearest: tuple[str, list[str]] | None = None
    for name, make in _CANDIDATES.items():
        problems = list(_attention_problems(name, mixture))
        stock = _build(make(mixture))
        problems += _block_problems(stock, mixture.layer)
        if not problems:
            return _filled(stock, model)
        if nearest is None or len(problems) < len(nearest[1]):
            nearest = name, problems
    assert nearest is not None
    name, (first, *more) = nearest
    others = f", and {len(more)} more differences" if more else ""
    raise InputError(
        f"checkpoint: no stock format holds it exactly; the nearest is {name}, where "
        f"{first}{others}: keep it as it is"
    )


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


def _build(config: Any) -> PreTrainedModel:
    with torch.device("meta"), warnings.catch_warnings():
        # An absent shared expert is, in stock architectures, one without neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return cast(
            PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        )


def _attention_problems(name: str, mixture: _Mixture) -> list[str]:
    """List what the attention of a stock architecture has otherwise than the model's."""
    config, has = mixture.config, _ATTENTION[name]
    problems = []
    if config.attention_bias and not has["bias"]:
        problems.append("queries, keys and values have no biases (attention_bias)")
    with_output = config.attention_bias and has["bias"] == "all"
    if bool(config.attention_output_bias) != with_output:
        there = "a" if with_output else "no"
        problems.append(f"attention's output has {there} bias (attention_output_bias)")
    if config.qk_norm and not has["norm"]:
        problems.append("queries and keys have no norms (qk_norm)")
    if not config.qk_norm and has["norm"] == "always":
        problems.append("queries and keys have norms (qk_norm)")
    if mixture.slides and not has["window"]:
        problems.append("attention sees all positions (sliding_window)")
    if len(set(config.layer_types)) > 1:
        problems.append("all layers attend alike (layer_types)")
    if not has["head_dim"] and config.head_dim != config.hidden_size / config.num_attention_heads:
        problems.append("heads are hidden_size / num_attention_heads wide (head_dim)")
    if mixture.dense and has["dense"] is None:
        problems.append("no layer is dense")
    elif mixture.dense and has["dense"] == "first" and mixture.first is None:
        problems.append("only the first layers are dense")
    return problems


def _block_problems(stock: PreTrainedModel, ours: SparseMoE) -> list[str]:
    """List the options that a stock model's mixtures have otherwise than a layer of ours."""
    name, block = next(iter(mixtures_of(stock).items()))
    try:
        theirs = hold(block, entry_of(block, name), name).layer
    except InputError as error:
        return [str(error)]
    one, other = _options(ours), _options(theirs)
    if one["router.score"] == other["router.score"] and not ours.router.selection_bias:
        other["router.selection_bias"] = False  # a bias of zero will do
    wrong = [key for key in one | other if one.get(key) != other.get(key)]
    return [f"{key} is {other.get(key)} and not {one.get(key)}" for key in wrong]


def _options(layer: SparseMoE) -> dict[str, Any]:
    """Return the options that say what a layer computes in inference, by their dotted names."""
    given: dict[str, Any] = layer.config()["init_args"]
    options = {k: v for k, v in given.items() if k not in ("balance", "router")}
    router = {k: v for k, v in given["router"].items() if k not in _TRAINING}
    # How many shared experts there are makes a difference to weights of their own only.
    if not layer.router.weights.with_shared:
        options.pop("num_shared_experts")
    if layer.shared_bias is None:
        options["shared_bias"] = layer.bias and bool(layer.d_shared)
    if layer.shared_glu is None:
        options["shared_glu"] = options["glu"]
    if router["num_groups"] == 1:
        router |= {"group_score": None, "top_groups": 1}
    elif router["group_score"] is None:
        router["group_score"] = "sum_of_two" if router["selection_bias"] else "max"
    if router["score"] != "sparse_mixer":
        router.pop("mixer_eps")
    if router["weights"]["eps"] is None:
        router["weights"] = {
            **router["weights"],
            "eps": 0.0 if router["score"] == "softmax" or not router["normalize"] else 1e-20,
        }
    return dict(_flattened(options | {"router": router}))


def _flattened(options: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


@torch.no_grad()
def _filled(stock: PreTrainedModel, model: MoezooForCausalLM) -> PreTrainedModel:
    """Hand a stock model that has no memory yet the tensors of ours, most without a copy."""
    tensors = plain_state_dict(model)
    wanted: Mapping[str, Tensor] = stock.state_dict()
    for name, block in mixtures_of(stock).items():
        held = hold(block, entry_of(block, name), name)
        number = int(name.split(".")[2])
        prefix = f"model.layers.{number}.mlp."
        ours = {n: tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
        for shared in held.shared:
            key = f"{name}.{shared.theirs}"
            tensor = ours.pop(prefix + shared.ours, None)
            if tensor is None:  # a selection bias, which is zero
                tensors[key] = torch.zeros(wanted[key].shape)
            elif shared.view in (as_it_is, flat):
                tensors[key] = tensor.reshape(wanted[key].shape)
            else:
                room = tensors.setdefault(key, torch.empty(wanted[key].shape, dtype=tensor.dtype))
                shared.view(room).copy_(tensor)
        assert not ours, ours.keys()
    for key, room in wanted.items():
        if key not in tensors:  # of a shared expert without neurons
            assert "shared_expert" in key, key
            tensors[key] = torch.zeros(room.shape, dtype=model.dtype)
    stock.load_state_dict(tensors, assign=True)
    stock.tie_weights()
    return stock.eval()


def _common(mixture: _Mixture, **fields: Any) -> dict[str, Any]:
    config = mixture.config
    own = {name: getattr(config, name) for name in _SAME}
    own["rope_parameters"] = dict(config.rope_parameters)
    if config.trained_length is not None:
        own["trained_length"] = config.trained_length
    top_k = mixture.layer.top_k
    return {**own, "hidden_act": mixture.activation, "num_experts_per_tok": top_k, **fields}


def _mixtral(mixture: _Mixture) -> Any:
    return MixtralConfig(
        **_common(
            mixture,
            head_dim=mixture.config.head_dim,
            intermediate_size=mixture.layer.d_expert,
            num_local_experts=mixture.layer.num_experts,
            sliding_window=mixture.config.sliding_window if mixture.slides else None,
        )
    )


def _qwen(mixture: _Mixture) -> dict[str, Any]:
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


def _qwen2_moe(mixture: _Mixture) -> Any:
    return Qwen2MoeConfig(
        **_qwen(mixture),
        qkv_bias=mixture.config.attention_bias,
        shared_expert_intermediate_size=mixture.layer.d_shared,
    )


def _qwen3_moe(mixture: _Mixture) -> Any:
    make: Callable[..., Any] = Qwen3MoeConfig  # the width of heads is not in its signature
    return make(
        **_qwen(mixture),
        head_dim=mixture.config.head_dim,
        attention_bias=mixture.config.attention_bias,
        sliding_window=None,
    )


def _glm4_moe(mixture: _Mixture) -> Any:
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


def _granitemoe(mixture: _Mixture) -> Any:
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


_CANDIDATES: dict[str, Callable[[_Mixture], Any]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "glm4_moe": _glm4_moe,
    "granitemoe": _granitemoe,
}

_ATTENTION: dict[str, dict[str, Any]] = {
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
}
"""Of each: which projections of attention may have biases, whether queries and keys have norms,
whether windows slide, whether the width of heads is free, and which layers may be dense."""
