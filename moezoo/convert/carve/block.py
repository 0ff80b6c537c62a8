"""The dense block that is cut up: gated or plain, with or without biases.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.errors import InputError
from moezoo_kernels.linear import linear

_CHUNK = 4096  # tokens whose activations are computed at a time


@dataclass(frozen=True)
class Block:
    """``down @ (act(gate @ x) * (up @ x)) + bias_out``, or ``down @ act(up @ x + bias_in) + …``.

    Attributes:
        gate: ``(F, D)``; None for a plain MLP.
        up: ``(F, D)``.
        down: ``(D, F)``.
        act: the activation, element by element.
        bias_in: ``(F,)``, of a plain MLP; None for none.
        bias_out: ``(D,)``; None for none.

    Raises:
        InputError: shapes do not fit together, or a gated block has an inner bias.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    act: Callable[[Tensor], Tensor] = F.silu
    bias_in: Tensor | None = None
    bias_out: Tensor | None = None

    def __post_init__(self) -> None:
        if self.up.ndim != 2:
            raise InputError(
                f"up: shape {tuple(self.up.shape)} is not (neurons, d_model); give a matrix"
            )
        width, d_model = self.up.shape
        wanted = {
            "gate": (self.gate, (width, d_model)),
            "down": (self.down, (d_model, width)),
            "bias_in": (self.bias_in, (width,)),
            "bias_out": (self.bias_out, (d_model,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is not None and tensor.shape != shape:
                raise InputError(
                    f"{name}: shape {tuple(tensor.shape)} does not fit up's; give {shape}"
                )
        if self.gate is not None and self.bias_in is not None:
            raise InputError(
                "bias_in: gated blocks with inner biases cannot be carved; convert a block "
                "without them"
            )

    @property
    def width(self) -> int:
        """Neurons F."""
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        """Width D of what goes in and comes out."""
        return self.up.shape[1]

    def to(self, dtype: torch.dtype) -> Block:
        """Change the dtype of all weights."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return Block(
            cast(self.gate),
            self.up.to(dtype),
            self.down.to(dtype),
            self.act,
            cast(self.bias_in),
            cast(self.bias_out),
        )

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Compute all neurons' activations h, ``(T, F)``."""
        up_TF = linear(x_TD, self.up, self.bias_in)
        return self.act(up_TF) if self.gate is None else self.act(linear(x_TD, self.gate)) * up_TF

    def activations(self, x_TD: Tensor) -> Tensor:
        """Compute :meth:`hidden` some tokens at a time: in between, a GLU needs thrice as much."""
        return torch.cat([self.hidden(part) for part in x_TD.split(_CHUNK)])

    def run(self, x_TD: Tensor) -> Tensor:
        """Compute the block, ``(T, D)``."""
        parts = (linear(self.hidden(x), self.down, self.bias_out) for x in x_TD.split(_CHUNK))
        return torch.cat(list(parts))

    def take(self, neurons: Tensor) -> Block:
        """Keep only some neurons."""
        return Block(
            None if self.gate is None else self.gate[neurons],
            self.up[neurons],
            self.down[:, neurons],
            self.act,
            None if self.bias_in is None else self.bias_in[neurons],
            self.bias_out,
        )
