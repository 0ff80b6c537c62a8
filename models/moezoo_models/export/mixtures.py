"""A mixture of ours as the stock one whose blocks compute the same, tensor for tensor.

What a stock block computes is read off it as for :func:`moezoo.adopt`: it is the options of a
SparseMoE. A stock architecture is the right one if these are the model's own; then each tensor of
ours is one of theirs, and logits are equal but for the order of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moezoo.errors import InputError
from moezoo.layers.sparse_moe import SparseMoE
from moezoo_models.adopt.layouts import as_it_is, flat
from moezoo_models.adopt.reading import entry_of, hold, mixtures_of
from moezoo_models.checkpoints.export import plain_state_dict
from moezoo_models.export.formats import ATTENTION, CANDIDATES, Mixture
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.latent_options import latent_of
from moezoo_models.model.llama import beyond_llama

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


def as_stock_mixture(model: MoezooForCausalLM) -> PreTrainedModel:
    """Return the stock model that computes what a mixture of ours does, with its tensors.

    Raises:
        InputError: there is none; says which comes nearest, and what it has otherwise.
    """
    mixture = Mixture(model)
    allowed = ["latent_attention"] if model.config.qk_norm else ["latent_attention", "qk_norm_over"]
    if (field := beyond_llama(model.config, allowed)) is not None:
        raise InputError(
            f"checkpoint: its {field} is in no stock format of mixtures; keep it as it is"
        )
    latent = model.config.latent_attention is not None
    nearest: tuple[str, list[str]] | None = None
    for name, make in CANDIDATES.items():
        if ATTENTION[name].get("latent", False) != latent:
            continue
        problems = list(_attention_problems(name, mixture))
        try:
            stock = _build(make(mixture))
        except StrictDataclassError as error:
            problems.append(f"the configuration is refused ({' '.join(str(error).split())})")
        else:
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


def _build(config: Any) -> PreTrainedModel:
    with torch.device("meta"), warnings.catch_warnings():
        # An absent shared expert is, in stock architectures, one without neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return cast(
            PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        )


def _attention_problems(name: str, mixture: Mixture) -> list[str]:
    """List what the attention of a stock architecture has otherwise than the model's."""
    config, has = mixture.config, ATTENTION[name]
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
    latent = latent_of(config)
    if latent is not None and has.get("interleave", False) and not latent.rope_interleave:
        problems.append("neighbours are turned together (latent_attention.rope_interleave)")
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
