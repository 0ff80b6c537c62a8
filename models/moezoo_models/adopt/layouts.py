"""The layouts in which classes of transformers store their experts, as views in ours.

Shapes: E experts, D d_model, F hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs that is one of ours.

    Attributes:
        path: its name within the block.
        hidden: the axis that F, or 2 F, is along; None if it is along none.
        view: from theirs to ours, without a copy.
    """

    path: str
    hidden: int | None
    view: Callable[[Tensor], Tensor] = _as_it_is


@dataclass(frozen=True)
class Layout:
    """How a class stores its experts.

    Attributes:
        title: in a few words.
        tensors: by the names that :class:`moezoo.experts.MLPExperts` has for them.
        gated: whether they are gated linear units.
        arguments: of :class:`moezoo.SparseMoE`, from the experts' module, beside these.
    """

    title: str
    tensors: dict[str, Stored]
    gated: bool = True
    arguments: Callable[[Any], dict[str, Any]] = field(default=lambda experts: {})


LAYOUTS = {
    "stacked": Layout(
        "gate and up (E, 2F, D), down (E, D, F)",
        {
            "gate_up_proj": Stored("experts.gate_up_proj", 1),
            "down_proj": Stored("experts.down_proj", 2),
        },
    ),
    "transposed": Layout(
        "gate and up (E, D, 2F), down (E, F, D)",
        {
            "gate_up_proj": Stored("experts.gate_up_proj", 2, _transposed),
            "down_proj": Stored("experts.down_proj", 1, _transposed),
        },
    ),
    "ungated": Layout(
        "up (E, F, D), down (E, D, F)",
        {
            "gate_up_proj": Stored("experts.up_proj", 1),
            "down_proj": Stored("experts.down_proj", 2),
        },
        gated=False,
    ),
}
"""Each layout by its name in the table of blocks."""

ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Ours by the class, or the name of the function, that theirs is."""


def activation_of(experts: Any) -> str | None:
    """Return the name of the activation of an experts' module; None where we have none."""
    function = getattr(experts, "act_fn", None)
    return ACTIVATIONS.get(getattr(function, "__name__", type(function).__name__))
