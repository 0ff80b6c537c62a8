"""The work between an expert's matrix products on a CPU: C++ passes, or plain torch.

Each C++ pass (csrc/grouped_mlp.cpp) reads its operands once and computes in fp32. Plain torch runs
where there is no library and in fp64 and fp16.

Shapes: T tokens, D width, F hidden width, I = 2 F if gated else F, n rows of one expert,
r >= n rows of its products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo_kernels import native
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions, activate, activate_backward
from moezoo_kernels.grouped_mlp.operands import Unit
from moezoo_kernels.grouped_mlp.stages import HiddenGradients


class RowPasses:
    """The row-wise passes around the products of one activation.

    Args:
        dtype: of the rows.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: whether the experts are gated linear units.
        glu: bounds of their factors.
        interleaved: gate and linear rows lie in turn.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        activation: str,
        gated: bool,
        glu: GLUOptions = PLAIN_GLU,
        interleaved: bool = False,
    ) -> None:
        self.unit = Unit(activation, gated, glu, interleaved)
        self.accumulation = torch.promote_types(dtype, torch.float32)
        self.native = native.unusable(torch.device("cpu"), dtype) is None
        if not self.native and dtype in (torch.float32, torch.bfloat16):
            native.warn_once()
        if self.native:
            self._codes = self.unit.encode()
            self._dtype = native.dtype_code(dtype)

    def activate(self, inner: Tensor) -> Tensor:
        """Return the hidden activations (n, F) of pre-activations (n, I)."""
        if not self.native:
            return activate(inner, *self.unit)
        n, width = inner.shape
        hidden = inner.new_empty(n, width // 2 if self.unit.gated else width)
        name = "moezoo_grouped_mlp_activate"
        native.call(name, inner, self._dtype, n, hidden.shape[1], *self._codes, hidden)
        return hidden

    def backward(self, grad: Tensor, inner: Tensor, weights: Tensor) -> HiddenGradients:
        """Recompute the activation and return its gradients.

        Args:
            grad: ``(r, F)``, gradient of the hidden activations before their router weights; rows
                from n on are not read.
            inner: ``(n, I)`` pre-activations.
            weights: ``(n,)`` router weights, of the dtype of sums.

        Returns:
            Weighted activations ``(r, F)`` and gradients ``(r, I)``, zeros from row n on, and
            the weights' gradients ``(n,)``.
        """
        n, (rows, width) = len(inner), grad.shape
        if not self.native:
            grad = grad[:n]
            weighted_grad = (grad * weights[:, None]).to(inner.dtype)
            hidden, of_inner = activate_backward(weighted_grad, inner, *self.unit)
            of_weights = (grad.to(self.accumulation) * hidden).sum(-1)
            hidden.mul_(weights[:, None])
            return HiddenGradients(_extend(hidden, rows), _extend(of_inner, rows), of_weights)
        found = HiddenGradients(
            torch.empty_like(grad), inner.new_empty(rows, inner.shape[1]), weights.new_empty(n)
        )
        for tensor in found[:2]:
            tensor[n:] = 0
        name = "moezoo_grouped_mlp_activate_backward"
        native.call(name, grad, inner, self._dtype, weights, n, width, *self._codes, *found)
        return found

    def combine(
        self,
        output: Tensor,
        tokens: Tensor,
        rows: Tensor,
        weights: Tensor | None,
        experts: int = 1,
    ) -> None:
        """Add ``weights[i] rows[i]`` to ``output[tokens[i]]``, in order of ``i``.

        Args:
            output: ``(T, D)`` of the dtype of sums.
            tokens: ``(n,)``, ascending within each expert.
            rows: ``(n, D)``.
            weights: ``(n,)`` of the dtype of sums; None for ones.
            experts: of how many these are the rows, one after the other.
        """
        add_rows(output, tokens, rows, weights, experts)


def _extend(tensor: Tensor, rows: int) -> Tensor:
    """Add rows of zeros, up to a number of rows."""
    missing = rows - len(tensor)
    return F.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def add_rows(
    output: Tensor, tokens: Tensor, rows: Tensor, weights: Tensor | None, experts: int = 1
) -> None:
    """Do what :meth:`RowPasses.combine` does, which needs no activation."""
    if native.unusable(torch.device("cpu"), rows.dtype) is not None:
        weighted = rows if weights is None else rows * weights[:, None]
        output.index_add_(0, tokens, weighted.to(output.dtype))
        return
    n, width = rows.shape
    code = native.dtype_code(rows.dtype)
    operands = (rows, code, tokens, weights, n, width, experts > 1, output)
    native.call("moezoo_grouped_mlp_combine", *operands)
