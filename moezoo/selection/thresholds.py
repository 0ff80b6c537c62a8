"""Thresholds on magnitudes: CATS, TEAL, WINA, CHESS and their mixture are all of this form.

| rule | thresholds |
| --- | --- |
| CATS (Lee et al. 2024, arXiv:2404.08763, eq. 5) | one on ``|act(gate)|`` |
| CHESS (He et al. 2024, arXiv:2409.01366, eq. 8) | ``√(τ / E[u_i²])`` on ``|act(gate_i)|`` |
| TEAL (Liu et al. 2024, arXiv:2408.14690, eq. 3) | one on each product's input |
| WINA (Chen et al. 2025, arXiv:2505.19427, eq. 4) | ``t / ‖W_:j‖`` on each product's input |
| R-Sparse (Zhang et al. 2025, arXiv:2504.19449, eq. 4) | as WINA; the others at low rank |

Shapes: T tokens, D d_model, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from moezoo.errors import check_int
from moezoo.routing.selection_bias import kept_in_fp32
from moezoo.selection.options import Thresholds
from moezoo.selection.selector import Matrix, Selector, Shares
from moezoo_kernels.linear import linear


def passes(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return where ``|v| > t``; a NaN passes, so that it is seen.

    Args:
        values: ``(..., C)``, any floating dtype; it is compared in fp32 or wider.
        thresholds: ``(C,)`` fp32.
    """
    return (values.detach().abs() <= thresholds).logical_not()


class LowRank(nn.Module):
    """A matrix at low rank, ``U V x``, made from the matrix and not trained (R-Sparse).

    Args:
        inputs: I.
        outputs: O.
        rank: R.

    Attributes:
        left: U, ``(O, R)``.
        right: V, ``(R, I)``.
    """

    left: Tensor
    right: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("left", torch.empty(outputs, rank))
        self.register_buffer("right", torch.empty(rank, inputs))

    def reset_parameters(self) -> None:
        """Fill the factors with zeros: until they are made, what is not kept is not read."""
        nn.init.zeros_(self.left)
        nn.init.zeros_(self.right)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``(T, I)`` with both, ``(T, O)``."""
        return linear(linear(x, self.right), self.left)


class ThresholdSelector(Selector):
    """Thresholds for each input and neuron, kept in fp32: 16 bits would move them.

    Args:
        d_model: inputs D.
        d_ff: neurons F.
        gated: whether the block has a gate; an MLP has thresholds on its input and hidden values.
        options: where the thresholds begin.

    Attributes:
        input: ``(D,)`` fp32.
        gate: ``(F,)``, gated blocks only.
        up_input: ``(D,)``, gated blocks only.
        hidden: ``(F,)``.
        shares: ``(4,)``, the :class:`moezoo.selection.Shares` that tokens kept when the thresholds
            were calibrated; ones before that.
    """

    input: Tensor
    gate: Tensor
    up_input: Tensor
    hidden: Tensor
    shares: Tensor

    def __init__(self, d_model: int, d_ff: int, gated: bool, options: Thresholds) -> None:
        super().__init__()
        self._options = options
        sizes = {"input": d_model, "hidden": d_ff}
        if gated:
            sizes |= {"gate": d_ff, "up_input": d_model}
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float32))
        self.factors = nn.ModuleDict()
        if options.remainder:
            rank = check_int("selection.remainder", options.remainder, maximum=min(d_model, d_ff))
            for matrix in ("gate", "up") if gated else ("up",):
                self.factors[matrix] = LowRank(d_model, d_ff, rank)
            self.factors["down"] = LowRank(d_ff, d_model, rank)
        self.register_buffer("shares", torch.empty(len(Shares._fields), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the thresholds with the options' numbers, and the shares with ones."""
        for name, buffer in self.named_buffers(recurse=False):
            nn.init.constant_(buffer, getattr(self._options, name, 1.0))
        for factors in self.factors.values():
            cast("LowRank", factors).reset_parameters()

    def keep_input(self, x_TD: Tensor) -> Tensor:
        """Keep ``|x_j| > input_j``."""
        return passes(x_TD, self.input)

    def keep_gate(self, gate_TF: Tensor) -> Tensor:
        """Keep ``|act(gate)_i| > gate_i``."""
        return passes(gate_TF, self.gate)

    def keep_up_input(self, x_TD: Tensor) -> Tensor:
        """Keep ``|x_j| > up_input_j``."""
        return passes(x_TD, self.up_input)

    def keep_hidden(self, hidden_TF: Tensor) -> Tensor:
        """Keep ``|h_i| > hidden_i``."""
        return passes(hidden_TF, self.hidden)

    @property
    def has_rest(self) -> bool:
        """Whether there are low-rank factors."""
        return len(self.factors) > 0

    def rest(self, matrix: Matrix, dropped: Tensor) -> Tensor | None:
        """Pass what is not kept through the matrix's low-rank factors, if it has some."""
        return self.factors[matrix](dropped) if matrix in self.factors else None

    def numbers(self) -> int:
        """Count the numbers of the low-rank factors."""
        return sum(buffer.numel() for buffer in self.factors.buffers())

    def calibrated(self) -> Shares:
        """Return the calibrated shares; all, without numbers on a device."""
        return Shares() if self.shares.is_meta else Shares(*self.shares.tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, kept_in_fp32(buffer, self.get_buffer(name)))
        return self
