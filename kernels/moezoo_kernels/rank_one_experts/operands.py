"""Operands and gradients of the backends of ``rank_one_experts``, under one name each.

Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """The tables, and the activation between them."""

    u: Tensor  # (N, D)
    v: Tensor  # (N, D)
    gate: Tensor | None  # (N, D)
    activation: str

    @property
    def gated(self) -> bool:
        """Whether the experts are gated linear units."""
        return self.gate is not None


class Needs(NamedTuple):
    """The gradients that are wanted."""

    x: bool
    u: bool
    v: bool
    gate: bool
    weights: bool

    @property
    def tables(self) -> bool:
        """Whether any table's gradient is wanted."""
        return self.u or self.v or self.gate


class Gradients(NamedTuple):
    """The gradients; None where not wanted.

    Attributes:
        x: ``(T, D)``.
        u: ``(N, D)``, or ``(R, D)`` for the rows alone.
        v: as ``u``.
        gate: as ``u``.
        weights: ``(T, J)``.
        rows: ``(R,)`` which rows the tables' gradients hold, in order; None for all.
    """

    x: Tensor | None
    u: Tensor | None
    v: Tensor | None
    gate: Tensor | None
    weights: Tensor | None
    rows: Tensor | None


def halves(inner: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Split ``(T, I)`` into the gate's half and the linear one; ungated, both are the whole."""
    if not gated:
        return inner, inner
    of_gate, of_u = inner.chunk(2, dim=-1)
    return of_gate, of_u
