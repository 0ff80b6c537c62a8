"""What a matrix promises that is not a plain linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.cost import Cost
from moezoo.errors import InputError
from moezoo.training_state import TrainingState


class Matrix(TrainingState):
    """A projection ``(..., in_features) -> (..., out_features)`` in the place of ``nn.Linear``.

    Args:
        in_features: width of what it reads.
        out_features: width of what it returns.
        bias: whether a bias is added.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the matrix that is computed with, ``(out_features, in_features)``.

        Gradients reach the parameters by the rule of training. A guide is no part of it.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The same, by the name that ``nn.Linear`` has for it."""
        return self.dense()

    def reference(self, x: Tensor) -> Tensor:
        """Return what :meth:`forward` does, by a sum for each row of :meth:`dense`."""
        return self._row_by_row(x, self.dense())

    def _row_by_row(self, x: Tensor, dense: Tensor) -> Tensor:
        output = torch.stack([(x * row).sum(dim=-1) for row in dense], dim=-1)
        return output if self.bias is None else output + self.bias

    def losses(self) -> dict[str, Tensor]:
        """Return losses of the parameters alone, weighted, by name; none by default."""
        return {}

    def cost(self) -> Cost:
        """Return parameters, FLOPs and bytes by formula, as of a layer."""
        raise NotImplementedError

    def _cost(self, total: int, active: int, products: int) -> Cost:
        """Add the bias to numbers of weights, and to multiply-adds of a token nothing."""
        biases, parameter = 0 if self.bias is None else self.out_features, next(self.parameters())
        return Cost(
            total_parameters=total + biases,
            active_parameters=active + biases,
            flops_per_token=2 * products,
            bytes_per_token=(products + biases) * parameter.element_size(),
        )

    def reset_parameters(self, std: float) -> None:
        """Initialise every parameter and buffer.

        Args:
            std: of the entries that a dense matrix would have in this place.
        """
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def scheduled(self) -> bool:
        """Whether :meth:`step` has to know the run's progress."""
        return False

    def step(self, progress: float | None = None) -> None:
        """Follow an optimizer step: move masks and schedules.

        Args:
            progress: optimizer steps done over optimizer steps planned.

        Raises:
            InputError: the matrix has a schedule, and no progress is given.
        """
        if progress is None and self.scheduled:
            raise InputError(
                "step: matrices with a schedule follow the run's progress; call step(progress), "
                "optimizer steps done over steps planned"
            )
