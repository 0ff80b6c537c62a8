"""The layouts in which classes of transformers store their experts, as views in ours.

Shapes: E experts, D d_model, F hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    """A tensor of theirs, or several, that are one of ours.

    Attributes:
        path: its name; with ``{}`` for the number of an expert, one of each.
        hidden: the axis that F, or a multiple, is along; None if it is along none.
        view: from theirs to ours, without a copy if there is one of theirs.
        beside: name of another, which ``view`` takes after the first.
        by_number: from the number of experts to a ``view`` that has to know it.
    """

    path: str
    hidden: int | None
    view: Callable[..., Tensor] = as_it_is
    beside: str | None = None
    by_number: Callable[[int], Callable[..., Tensor]] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor, with experts along its first axis."""
        return "{}" not in self.path and self.by_number is None

    def paths(self, num_experts: int) -> tuple[str, ...]:
        """List the names of theirs, in the order in which the view takes them."""
        if "{}" in self.path:
            return tuple(self.path.format(number) for number in range(num_experts))
        return (self.path,) if self.beside is None else (self.path, self.beside)


@dataclass(frozen=True)
class Layout:
    """How a class stores its experts.

    Attributes:
        title: in a few words.
        trap: what one would guess wrong.
        tensors: by the names that :class:`moezoo.experts.MLPExperts` has for them. Paths are
            within the block.
        gated: whether they are gated linear units.
        interleaved: whether gate and up lie in turn.
    """

    title: str
    trap: str
    tensors: dict[str, Stored]
    gated: bool = True
    interleaved: bool = False


def _stacked(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


def _halves(num_experts: int) -> Callable[..., Tensor]:
    def joined(gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([part.unflatten(0, (num_experts, -1)) for part in (gate, up)], dim=1)

    return joined


def _rows_of_each(num_experts: int) -> Callable[..., Tensor]:
    return lambda tensor: tensor.unflatten(0, (num_experts, -1)).transpose(1, 2)


_TRANSPOSED = {
    "gate_up_proj": Stored("experts.gate_up_proj", 2, _transposed),
    "down_proj": Stored("experts.down_proj", 1, _transposed),
}
_BIASED = {
    **_TRANSPOSED,
    "gate_up_bias": Stored("experts.gate_up_proj_bias", 1),
    "down_bias": Stored("experts.down_proj_bias", None),
}

LAYOUTS = {
    "stacked": Layout(
        "gate and up (E, 2F, D), down (E, D, F)",
        "the checkpoints of most store each expert by itself, and are stacked when they are loaded",
        {
            "gate_up_proj": Stored("experts.gate_up_proj", 1),
            "down_proj": Stored("experts.down_proj", 2),
        },
    ),
    "transposed": Layout(
        "gate and up (E, D, 2F), down (E, F, D)",
        "columns are hidden neurons here, where rows are in the other layouts",
        _TRANSPOSED,
    ),
    "interleaved": Layout(
        "gate and up in turn (E, D, 2F), down (E, F, D), biases (E, 2F) and (E, D)",
        "even columns are the gate, odd ones the linear half; biases likewise",
        _BIASED,
        interleaved=True,
    ),
    "biased": Layout(
        "gate and up (E, D, 2F), down (E, F, D), biases (E, 2F) and (E, D)",
        "the same names as with columns in turn, and another order",
        _BIASED,
    ),
    "ungated": Layout(
        "up (E, F, D), down (E, D, F)",
        "no gate, here and in the shared expert, and squared ReLU",
        {
            "gate_up_proj": Stored("experts.up_proj", 1),
            "down_proj": Stored("experts.down_proj", 2),
        },
        gated=False,
    ),
    "longcat": Layout(
        "gate and up (E + I, 2F, D), down (E, D, F) with I identity experts",
        "identity experts have rows of gate and up, which nothing reads",
        {
            "gate_up_proj": Stored("experts.gate_up_proj", 1),
            "down_proj": Stored("experts.down_proj", 2),
        },
    ),
    "dbrx": Layout(
        "gate (E F, D) and up (E F, D), down (E F, D)",
        "gate and up lie apart: joined, and so copied, with every pass",
        {
            "gate_up_proj": Stored("experts.mlp.w1", 0, beside="experts.mlp.v1", by_number=_halves),
            "down_proj": Stored("experts.mlp.w2", 0, by_number=_rows_of_each),
        },
    ),
    "switch": Layout(
        "up (F, D) and down (D, F) of each expert, in a module of its own",
        "stacked, and so copied, with every pass",
        {
            "gate_up_proj": Stored("experts.expert_{}.wi.weight", 0, _stacked),
            "down_proj": Stored("experts.expert_{}.wo.weight", 1, _stacked),
        },
        gated=False,
    ),
    "jetmoe": Layout(
        "gate and up (E, 2F, D), down (E, D, F), each in a module",
        "a bias (D,) is added once per token, after the sum over experts and not by each",
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


def _first_half(tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[0]


def _second_half(tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[1]


_LINEARS = {
    "up_proj.weight": Stored("up_proj.weight", 0),
    "down_proj.weight": Stored("down_proj.weight", 1),
}
SHARED = {
    "linears": {"gate_proj.weight": Stored("gate_proj.weight", 0), **_LINEARS},
    "ungated": _LINEARS,
    "fused": {
        "gate_proj.weight": Stored("gate_up_proj.weight", 0, _first_half),
        "up_proj.weight": Stored("gate_up_proj.weight", 0, _second_half),
        "down_proj.weight": _LINEARS["down_proj.weight"],
    },
    "stacked": {
        "gate_proj.weight": Stored("gate_proj", 1, _side_by_side),
        "up_proj.weight": Stored("up_proj", 1, _side_by_side),
        "down_proj.weight": Stored("down_proj", 2, _side_by_side_down),
    },
}
"""Forms of shared experts: by the names of :class:`moezoo.DenseFFN`, the paths in theirs.

``stacked``: several, side by side; the down projections are copied with every pass.
"""
