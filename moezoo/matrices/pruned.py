"""Matrices of which weights, or blocks of them, are zero: pruned, and perhaps grown elsewhere.

An update of the mask keeps ``k - g`` units of largest magnitude, of those that it had, and adds the
g others of largest gradient; k follows a cubic curve down to the sparsity, g half a cosine to zero.

- static at random, ``end: 0``: sparse pre-training (Thangarasa et al. 2023, arXiv:2303.10464);
- the same with growth: RigL (Evci et al. 2019, arXiv:1911.11134, algorithm 1);
- a curve without growth: gradual magnitude pruning (Zhu and Gupta 2017, arXiv:1710.01878);
- blocks, with both: BLaST (Okanovic et al. 2025, arXiv:2507.03117), whose growth is our reading.

Shapes: R rows and C columns of units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.cost import Cost
from moezoo.matrices import rules
from moezoo.matrices.masked import Masked, times
from moezoo.matrices.options import Pruned
from moezoo.matrices.packing import Pattern
from moezoo.matrices.schedules import cosine, cubic
from moezoo.parallel import whole

ENDED = -1
"""In place of the number of steps: all weights learn again, and no later run prunes them."""


class PrunedMatrix(Masked):
    """Zeros outside a mask, which moves."""

    steps: Tensor
    listening: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, options: Pruned) -> None:
        super().__init__(in_features, out_features, bias)
        self.options = options
        if options.moves:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if options.growth:  # whether the next gradient says what to grow
            self.register_buffer("listening", torch.zeros((), dtype=torch.bool))

    def dense(self) -> Tensor:
        """Multiply the weights by the mask.

        Their gradient is that of the product where the mask is one. For the step before an update
        it is there everywhere: it says what to grow.
        """
        if not self.options.growth:
            return self.latent * self.mask
        return times(self.latent, self.mask, self.mask | self.listening)

    def _zeros(self) -> Pattern | None:
        return None if self.options.block == 1 else Pattern(block=self.options.block)

    def cost(self) -> Cost:
        """What the schedule keeps in the end counts, in products that are computed dense."""
        rows, columns = self._units()
        units = self.options.block**2
        numbers = self.in_features * self.out_features
        return self._cost(numbers, rows * self._target(1.0, columns) * units, numbers)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights for the inputs that count, and the mask if it is random."""
        rows, columns = self._units()
        kept = self._target(0.0, columns)
        super().reset_parameters(std * (columns / kept) ** 0.5)
        with torch.no_grad():
            if self.options.moves:
                self.steps.zero_()
            if self.options.growth:
                self.listening.fill_(self.options.every == 1)
            if kept == columns:
                self.mask.fill_(True)
                return
            drawn = torch.rand(rows, columns, dtype=torch.float32, device=self.latent.device)
            self._keep(rules.best_of_row(drawn, kept))
            self.latent.mul_(self.mask)

    @property
    def scheduled(self) -> bool:
        """Whether the mask changes."""
        return self.options.moves or self.options.dense_from is not None

    @torch.no_grad()
    def step(self, progress: float | None = None) -> None:
        """Set to zero what is outside the mask; then update the mask if it is time."""
        super().step(progress)
        options = self.options
        self._clear()  # momentum, decay and a gradient that was listened to have moved them
        if progress is None or not self.scheduled:
            return
        if self._ended or (options.dense_from is not None and progress >= options.dense_from):
            self._end()
            return
        if options.moves:
            self.steps += 1
            if int(self.steps) % options.every == 0:
                self._update(progress)
                self._clear()
        if options.growth:
            self._listen(progress)

    @property
    def _ended(self) -> bool:
        """Whether all weights learn again, in a later run too."""
        return self.options.moves and int(self.steps) == ENDED

    def _end(self) -> None:
        """Set the mask to all weights, which learn from here on."""
        self.mask.fill_(True)
        if self.options.moves:
            self.steps.fill_(ENDED)
        if self.options.growth:
            self.listening.fill_(False)

    def _clear(self) -> None:
        self.latent.mul_(_laid_as(self.latent, self.mask))

    def _listen(self, progress: float) -> None:
        """Note whether an update that grows follows the next step."""
        due = (int(self.steps) + 1) % self.options.every == 0
        self.listening.fill_(due and progress < self.options.growth_end)

    def _units(self) -> tuple[int, int]:
        """Return the rows and columns among which a number is kept in each row."""
        block = self.options.block
        rows, columns = self.out_features // block, self.in_features // block
        return (rows, columns) if self.options.scope == "row" else (1, rows * columns)

    def _target(self, progress: float, columns: int) -> int:
        """Return how many units of a row are to be kept, one at least."""
        options = self.options
        sparsity = cubic(progress, options.start, options.end, options.sparsity)
        return max(round((1.0 - sparsity) * columns), 1)

    def _update(self, progress: float) -> None:
        (rows, columns), block = self._units(), self.options.block
        units_RC = self.mask[::block, ::block].reshape(rows, columns)
        kept = min(int(units_RC[0].sum()), self._target(progress, columns))
        gradient = self._gradient()
        growing = 0.0 if gradient is None else self.options.growth
        grown = int(growing * cosine(progress, self.options.growth_end) * kept)
        grown = min(grown, columns - kept)
        size_RC = rules.block_norms(whole(self.latent), block).reshape(rows, columns)
        # Below every magnitude: what is not in the mask cannot stay.
        stay_RC = rules.best_of_row(size_RC.masked_fill(~units_RC, -1.0), kept - grown)
        if grown and gradient is not None:
            slope_RC = rules.block_norms(gradient, block).reshape(rows, columns)
            stay_RC |= rules.best_of_row(slope_RC.masked_fill(stay_RC, -1.0), grown)
        self._keep(stay_RC)

    def _keep(self, units_RC: Tensor) -> None:
        block = self.options.block
        units = units_RC.reshape(self.out_features // block, self.in_features // block)
        self.mask.copy_(rules.in_blocks(units, block))

    def _gradient(self) -> Tensor | None:
        """Return the gradient of all weights, averaged over processes as the optimizer had it."""
        return None if self.latent.grad is None else whole(self.latent.grad)


def _laid_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a whole tensor that lies where a parameter's part does."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
