"""Norms around routed experts, as Muse Spark has them (transformers' ``muse_spark``).

Shapes: N rows, D width of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_flag, check_number
from moezoo_kernels.dtypes import at_least_fp32


@dataclass(frozen=True)
class ExpertNormOptions:
    """Which norms stand around routed experts; those of shared experts have none.

    Attributes:
        input: normalise what experts read, ``x / rms(x) * (1 + g)`` with a learned g; with
            ``d_latent`` after the map to that width.
        output: normalise what each expert returns before it is weighed and summed,
            ``z / rms(z)`` of ``z = E(x) * (1 + g)``; all experts share g.
        input_eps: added to the mean square of ``input``.
        output_eps: added to the mean square of ``output``.
    """

    input: bool = False
    output: bool = False
    input_eps: float = 1e-6
    output_eps: float = 1e-6

    def check(self, weigh_inputs: bool) -> None:
        """Check the options.

        Args:
            weigh_inputs: whether router weights multiply what experts read.

        Raises:
            InputError: a value is out of range, or has no effect.
        """
        for name in ("input", "output"):
            has = check_flag(f"expert_norms.{name}", getattr(self, name))
            eps = check_number(f"expert_norms.{name}_eps", getattr(self, f"{name}_eps"))
            if not eps:
                raise InputError(
                    f"expert_norms.{name}_eps: 0 divides by zero where there is nothing to "
                    "normalise; give e.g. 1e-6"
                )
            if not has and eps != getattr(ExpertNormOptions, f"{name}_eps"):
                raise InputError(f"expert_norms.{name}_eps: there is no norm; set {name} to true")
            if has and weigh_inputs:
                raise InputError(
                    f"expert_norms.{name}: takes away what router.weights.apply_to: input "
                    "multiplies by; set either back"
                )


class _Norm(nn.Module):
    """A norm with a scale that is stored less one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it scale by one."""
        nn.init.zeros_(self.weight)


class InputNorm(_Norm):
    """``x / rms(x) * (1 + g)``, in fp32 or wider."""

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Return the rows normalised, in their dtype."""
        x_ND = at_least_fp32(rows_ND)
        scale_D = 1.0 + self.weight.to(x_ND.dtype)
        return F.rms_norm(x_ND, scale_D.shape, scale_D, self.eps).to(rows_ND.dtype)


class OutputNorm(_Norm):
    """``z / rms(z)`` of ``z = x * (1 + g)``, in fp32 or wider."""

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Return the rows normalised, in their dtype."""
        x_ND = at_least_fp32(rows_ND)
        z_ND = x_ND * (1.0 + self.weight.to(x_ND.dtype))
        return F.rms_norm(z_ND, self.weight.shape, None, self.eps).to(rows_ND.dtype)

    def factors(self, rows_ND: Tensor) -> Tensor:
        """Return what each row is multiplied by beside ``1 + g``, ``1 / rms(z)``: ``(N, 1)``."""
        z_ND = at_least_fp32(rows_ND) * (1.0 + self.weight.to(at_least_fp32(rows_ND).dtype))
        return (z_ND.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
