"""The layouts in which classes of transformers store their experts, as views in ours.

Shapes: E experts, D d_model, F hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def as_it_is(tensor: Tensor) -> Tensor:
    """Return the tensor itself, so that parameters stay parameters."""
    return tensor


def flat(tensor: Tensor) -> Tensor:
    """Return a vector, however it is stored."""
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs that is one of ours.

    Attributes:
        path: its name.
        hidden: the axis that F, or 2 F, is along; None if it is along none.
        view: from theirs to ours, without a copy.
    """

    path: str
    hidden: int | None
    view: Callable[[Tensor], Tensor] = as_it_is


@dataclass(frozen=True)
class Layout:
    """How a class stores its experts.

    Attributes:
        title: in a few words.
        tensors: by the names that :class:`moezoo.experts.MLPExperts` has for them. Paths are
            within the block.
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
    "jetmoe": Layout(
        "gate and up (E, 2F, D), down (E, D, F), each in a module",
        {
            "gate_up_proj": Stored("input_linear.weight", 1),
            "down_proj": Stored("output_linear.weight", 2),
        },
    ),
}
"""Each layout by its name in the table of blocks."""


def rows(begin: int | None, end: int | None) -> Callable[[Tensor], Tensor]:
    """Return the view of some rows."""
    return lambda tensor: tensor[begin:end]


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


def _side_by_side_down(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).flatten(1)


_LINEARS = {
    "up_proj.weight": Stored("up_proj.weight", 0),
    "down_proj.weight": Stored("down_proj.weight", 1),
}
SHARED = {
    "linears": {"gate_proj.weight": Stored("gate_proj.weight", 0), **_LINEARS},
    "ungated": _LINEARS,
    "stacked": {
        "gate_proj.weight": Stored("gate_proj", 1, _side_by_side),
        "up_proj.weight": Stored("up_proj", 1, _side_by_side),
        "down_proj.weight": Stored("down_proj", 2, _side_by_side_down),
    },
}
"""Forms of shared experts: by the names of :class:`moezoo.DenseFFN`, the paths in theirs.

``stacked``: several, side by side; the down projections are copied with every pass.
"""

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


def activation_of(*modules: Any) -> str | None:
    """Return the name of the first activation that modules have; None where we have none."""
    names = ("act_fn", "activation")
    found = [getattr(module, name, None) for module in modules for name in names]
    function = next((each for each in found if each is not None), None)
    return ACTIVATIONS.get(getattr(function, "__name__", type(function).__name__))
