"""Stock mixtures of transformers as ours, to be decoded: the same tensors in another module.

Attention, norms and dense blocks of the families listed here are a Llama's, or what our decoder has
beside that. Their mixtures are read as :func:`moezoo.adopt` reads them: options off the modules,
tensors where they are. Nothing is copied: the two are one model for as long as a text takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from moezoo.errors import InputError
from moezoo_models.adapters.torch import has_forward_hooks
from moezoo_models.adapters.transformers import attention_backend
from moezoo_models.adopt.block import module_of, path_of
from moezoo_models.adopt.holding import Held
from moezoo_models.adopt.reading import entry_of, hold, is_mixture
from moezoo_models.adopt.trial import fingerprint
from moezoo_models.families.family import activation, attention_biases, refuse, rope, windows
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.norm import Norm
from moezoo_models.model.rotary import RotaryEmbedding

_THEIRS = ("torch.nn.modules", "transformers.activations")
"""Where classes are, beside the family's own, whose instances are what their weights say."""

_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def _sliding(config: Any) -> dict[str, Any]:
    """Describe the windows of a family whose window means nothing unless a layer slides."""
    return windows(config) if "sliding_attention" in config.layer_types else {}


def _dots1(config: Any) -> dict[str, Any]:
    return {"qk_norm": True, **attention_biases(config), **_sliding(config)}


def _glm4_moe(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": config.use_qk_norm,
        "attention_bias": config.attention_bias,
        "rope_parameters": rope(config, partial=True),
    }


def _mixtral(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _olmoe(config: Any) -> dict[str, Any]:
    refuse(config, {"clip_qkv": None}, "bounds queries, keys and values")
    return {"qk_norm": True, "qk_norm_over": "projection", **attention_biases(config)}


def _qwen2_moe(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **_sliding(config)}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": True,
        "sliding_window": config.sliding_window,
        **attention_biases(config),
    }


_FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    f"{module_of(family)}.{name}ForCausalLM": options
    for family, name, options in (
        ("dots1", "Dots1", _dots1),
        ("glm4_moe", "Glm4Moe", _glm4_moe),
        ("mixtral", "Mixtral", _mixtral),
        ("olmoe", "Olmoe", _olmoe),
        ("qwen2_moe", "Qwen2Moe", _qwen2_moe),
        ("qwen3_moe", "Qwen3Moe", _qwen3_moe),
    )
}
"""By the path of a model's class, what our configuration says of it beside what all share.

Each was read in transformers 5.23, and raises :class:`InputError` for what ours does not have.
"""


@dataclass
class _Twin:
    """A stock model and ours of the same tensors, without a reference to the former.

    Attributes:
        read: what the former's computation depends on beside its weights, as it was read.
        ours: our model.
        held: its mixtures.
        others: every other parameter of ours: its full name, which is theirs too, and the module
            and name under which it is kept.
    """

    read: str
    ours: MoezooForCausalLM
    held: list[Held]
    others: list[tuple[str, nn.Module, str]]

    def bind(self, model: PreTrainedModel) -> None:
        """Hand ours the parameters that the stock model has now."""
        for held in self.held:
            held.bind()
        theirs = dict(model.named_parameters(remove_duplicate=False))
        for full, module, name in self.others:
            setattr(module, name, theirs[full])


_TWINS: WeakKeyDictionary[PreTrainedModel, _Twin] = WeakKeyDictionary()
"""Kept from text to text, as reading a model takes longer than a few tokens."""


def as_ours(model: PreTrainedModel) -> MoezooForCausalLM | None:
    """Return a stock mixture as ours, of the same tensors; None where its own code decodes it.

    Args:
        model: any, on any device.
    """
    if path_of(model) not in _FAMILIES or model.training:
        return None
    known = (type(model).__module__, *_THEIRS)
    if attention_backend(model.config) != "sdpa":
        return None
    if not all(_is_itself(module, known) for module in model.modules()):
        return None
    now = f"{model.config}{fingerprint(model)}"
    twin = _TWINS.get(model)
    if twin is None or twin.read != now:
        try:
            twin = _TWINS[model] = _read(model, now)
        except InputError:
            return None
    twin.bind(model)
    return twin.ours


def _is_itself(module: nn.Module, known: tuple[str, ...]) -> bool:
    """Return whether a part is of a known class, and nobody changes or watches its calls."""
    ours = type(module).__module__.startswith(known)
    return ours and "forward" not in vars(module) and not has_forward_hooks(module)


def _read(model: Any, read: str) -> _Twin:
    """Build our model, and its mixtures out of theirs; its other parameters hold nothing yet.

    Raises:
        InputError: the model does something that ours does not have.
    """
    config: Any = model.config
    block = {
        "d_ff": config.intermediate_size,
        "activation": activation("hidden_act", config.hidden_act),
    }
    ours = MoezooConfig(
        **{
            **{name: getattr(config, name) for name in _COPIED},
            "head_dim": getattr(config, "head_dim", None),
            "rope_parameters": rope(config),
            "ffn": [{"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": block}],
            **_FAMILIES[path_of(model)](config),
        }
    )
    with torch.device("meta"):
        made = MoezooForCausalLM(ours)
    mixtures = {
        f"model.layers.{number}.mlp": layer.mlp
        for number, layer in enumerate(model.model.layers)
        if is_mixture(layer.mlp)
    }
    held = {name: hold(block, entry_of(block, name), name) for name, block in mixtures.items()}
    for name, mixture in held.items():
        made.set_submodule(name, mixture.layer)
    inside = tuple(f"{name}." for name in held)
    for path, module in made.named_modules():
        if isinstance(module, Norm):
            module.eps = model.get_submodule(path).variance_epsilon
    with torch.device(model.device):
        made.model.rotary_emb = RotaryEmbedding(ours)
    others = [
        (f"{path}.{name}", module, name)
        for path, module in made.named_modules()
        if not f"{path}.".startswith(inside)
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for full, module, name in others:
        if full not in theirs or theirs[full].shape != getattr(module, name).shape:
            raise InputError(f"model: {full} is not as its configuration has it")
    return _Twin(read, made.eval(), list(held.values()), others)
