"""What is to be known of a dense architecture, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from moezoo.errors import InputError, check_choice
from moezoo_models.files.layout import Rule

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
    "leaky_relu": "leaky_relu",
}
"""transformers' names of activations, and ours."""


@dataclass(frozen=True)
class Family:
    """A dense architecture.

    Attributes:
        config: transformers' configuration class.
        options: given one of those, the arguments of ours beside those that all share; raises
            :class:`InputError` for what ours cannot hold.
        block: the same for :class:`moezoo.DenseFFN`.
        layout: what its tensors are here, if they do not have a Llama's names.
        older: what tensors under names of older files are in transformers' model.
    """

    config: type[PreTrainedConfig]
    options: Callable[[Any], dict[str, Any]]
    block: Callable[[Any], dict[str, Any]]
    layout: Callable[[Any], tuple[Rule, ...]] = lambda _: ()
    older: tuple[Rule, ...] = ()


def gated_block(config: Any) -> dict[str, Any]:
    """Describe a Llama's feed-forward block."""
    return {
        "d_ff": config.intermediate_size,
        "activation": activation("hidden_act", config.hidden_act),
        "gated": True,
        "bias": getattr(config, "mlp_bias", False),
    }


def activation(field: str, theirs: str) -> str:
    """Return our name of an activation.

    Raises:
        InputError: there is none.
    """
    return ACTIVATIONS[check_choice(field, theirs, ACTIVATIONS)]


def attention_biases(config: Any) -> dict[str, Any]:
    """Describe biases in all four projections, if there are any."""
    return {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_bias}


def windows(config: Any) -> dict[str, Any]:
    """Describe the windows of an architecture that says which layers slide."""
    return {"sliding_window": config.sliding_window, "layer_types": list(config.layer_types)}


def rope(config: Any, partial: bool = False) -> dict[str, Any]:
    """Copy rotary parameters.

    Args:
        config: transformers' configuration.
        partial: whether the architecture's default kind turns a part of each head; most ignore it.
    """
    parameters = dict(config.rope_parameters)
    if not partial and parameters.get("rope_type") == "default":
        parameters.pop("partial_rotary_factor", None)
    return parameters


def refuse(config: Any, wanted: Mapping[str, Any], why: str) -> None:
    """Refuse fields with other values than those that can be held.

    Args:
        config: transformers' configuration.
        wanted: values, by field; None stands for false and null.
        why: what is wrong with others.

    Raises:
        InputError: names the first.
    """
    for field, value in wanted.items():
        found = getattr(config, field, None)
        if (found or None) != (value or None):
            raise InputError(f"{field}: {found!r} {why}")
