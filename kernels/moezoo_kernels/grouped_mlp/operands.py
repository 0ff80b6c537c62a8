"""Operands and gradients of the fused backends of ``grouped_mlp``, under one name each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels.activations import ACTIVATION_CODES, PLAIN_GLU, GLUOptions


class Unit(NamedTuple):
    """What is between an expert's products; the arguments of ``activate`` beside its operand."""

    activation: str
    gated: bool
    glu: GLUOptions = PLAIN_GLU
    interleaved: bool = False

    def encode(self) -> tuple[int | float | bool, ...]:
        """Return what the C++ kernels take for it."""
        code = ACTIVATION_CODES[self.activation]
        return code, self.gated, *self.glu.encode(), self.interleaved


class Experts(NamedTuple):
    """The stacked experts; E experts, D width, F hidden width, I = 2 F if gated else F."""

    w_in: Tensor  # (E, I, D)
    w_out: Tensor  # (E, D, F)
    bias_in: Tensor | None  # (E, I)
    bias_out: Tensor | None  # (E, D)
    unit: Unit


class Needs(NamedTuple):
    """The gradients that are wanted."""

    x: bool
    w_in: bool
    w_out: bool
    weights: bool
    bias_in: bool
    bias_out: bool


class Gradients(NamedTuple):
    """The gradients, each in the shape and dtype of its tensor; None where not wanted."""

    x: Tensor | None
    w_in: Tensor | None
    w_out: Tensor | None
    weights: Tensor | None
    bias_in: Tensor | None
    bias_out: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over a token's experts: fp32, or fp64 if the operands are."""
    return torch.promote_types(dtype, torch.float32)
