"""SparseAdam in time that follows the rows of the batch, whatever the size of the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SparseAdam

from moezoo_kernels.adam_rows import adam_rows


class RowAdam(SparseAdam):
    """torch's SparseAdam, with the same state and the same updates up to rounding.

    Rows without a gradient, and their moments, stay as they are, bit for bit.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows of every parameter that has a gradient, which is sparse."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.coalesce(), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        adam_rows(
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient.indices()[0],
            gradient.values(),
            betas=(beta1, beta2),
            eps=group["eps"],
            step_size=float(group["lr"]) * correction,
        )
