"""The base of all rules that choose what a token reads of a dense block.

Shapes: T tokens, D d_model, F hidden width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moezoo.feed_forward import TokenContext

Matrix = Literal["gate", "up", "down"]


class Kept(NamedTuple):
    """What each token reads, as bool masks; None where it reads all.

    Attributes:
        input: ``(T, D)``, of what the gate's product reads, or an MLP's first.
        gate: ``(T, F)``, neurons that go on to the product with W_up.
        up_input: ``(T, D)``, of what the product with W_up reads, in gated blocks.
        hidden: ``(T, F)``, of the hidden values that the product with W_down reads.
        neurons: ``(T, F)``, those of which anything is computed.
    """

    input: Tensor | None
    gate: Tensor | None
    up_input: Tensor | None
    hidden: Tensor | None
    neurons: Tensor | None = None


class Shares(NamedTuple):
    """The shares that tokens keep on average, as of :class:`Kept`; ``hidden`` of all F neurons."""

    input: float = 1.0
    gate: float = 1.0
    up_input: float = 1.0
    hidden: float = 1.0


class Selector(nn.Module):
    """A rule. Each method returns a bool mask, true where kept; None keeps all, as here.

    The masks are constants to the gradient, which flows through what is kept.
    """

    def keep_neurons(self, x_TD: Tensor, context: TokenContext) -> Tensor | None:
        """Choose neurons before anything of the block is computed, ``(T, F)``."""
        return None

    def keep_input(self, x_TD: Tensor) -> Tensor | None:
        """Choose the entries that the gate's product reads, or an MLP's first, ``(T, D)``."""
        return None

    def keep_gate(self, gate_TF: Tensor) -> Tensor | None:
        """Choose neurons by the activated gate, ``(T, F)``; gated blocks only."""
        return None

    def keep_up_input(self, x_TD: Tensor) -> Tensor | None:
        """Choose the entries that the product with W_up reads, ``(T, D)``; gated blocks only."""
        return None

    def keep_hidden(self, hidden_TF: Tensor) -> Tensor | None:
        """Choose among hidden values, ``(T, F)``."""
        return None

    @property
    def has_rest(self) -> bool:
        """Whether :meth:`rest` makes anything of the inputs that are not kept."""
        return False

    def rest(self, matrix: Matrix, dropped: Tensor) -> Tensor | None:
        """Return what a matrix's product makes of the inputs that are not kept; None for nothing.

        Args:
            matrix: which one: ``gate``, ``up`` or ``down``.
            dropped: its inputs, ``(T, D)`` or ``(T, F)``, with zeros where they are kept.
        """
        return None

    def numbers(self) -> int:
        """Count the numbers that a token's choice, or the rest, multiplies with."""
        return 0

    def calibrated(self) -> Shares:
        """Return what tokens keep on average, as calibrated; all, where nothing is known."""
        return Shares()

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer."""


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values with zeros where the mask is false."""
    return values if mask is None else values.masked_fill(~mask, 0.0)


def dropped(values: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the values with zeros where the mask is true; None stands for zeros alone."""
    return None if mask is None else values.masked_fill(mask, 0.0)


def added(product: Tensor, rest: Tensor | None) -> Tensor:
    """Return a sum of which the second part may be nothing."""
    return product if rest is None else product + rest


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return where two masks are both true; None stands for all."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def or_dense(mask: Tensor | None, dense_T: Tensor | None) -> Tensor | None:
    """Return the mask with everything kept for some tokens."""
    if mask is None or dense_T is None:
        return mask
    return mask | dense_T.unsqueeze(-1)


def share(mask: Tensor | None, like_T: Tensor) -> Tensor:
    """Return the share of a mask's entries that each token keeps, ``(T,)`` fp32."""
    if mask is None:
        return torch.ones_like(like_T, dtype=torch.float32)
    return mask.float().mean(dim=-1)
