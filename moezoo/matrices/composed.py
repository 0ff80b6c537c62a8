"""Matrices made of sparse ones: a product of two, a sum, and one beside a product of low rank.

Thangarasa et al. 2023, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency" (arXiv:2303.11525, section 3). With the ranks that are their defaults, what counts of a
matrix takes as many multiply-adds as a dense matrix of its size: ``r (1 - s) (in + out)`` of the
product, ``(1 - s) in out + r (in + out)`` of the sum.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Self

import torch
from torch import Tensor, nn

from moezoo.cost import Cost
from moezoo.matrices.checks import check_multiple
from moezoo.matrices.matrix import Matrix
from moezoo.matrices.options import Doped, Factorized, Parallel
from moezoo.matrices.packing import Packing, settled
from moezoo.matrices.pruned import PrunedMatrix
from moezoo_kernels.linear import linear


class FactorizedMatrix(Matrix):
    """``W = U V``, both of them pruned: *sparse factorized*."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, options: Factorized
    ) -> None:
        super().__init__(in_features, out_features, bias)
        rank = options.rank_of(in_features, out_features)
        self.first = PrunedMatrix(in_features, rank, False, options)
        self.second = PrunedMatrix(rank, out_features, False, options)

    def forward(self, x: Tensor) -> Tensor:
        """Go through the factors one after the other."""
        output: Tensor = self.second(self.first(x))
        return output if self.bias is None else output + self.bias

    def dense(self) -> Tensor:
        """Multiply what counts of the factors."""
        return self.second.dense() @ self.first.dense()

    def cost(self) -> Cost:
        """What counts of both factors is active."""
        return _sum(self, self.first.cost(), self.second.cost())

    def reset_parameters(self, std: float) -> None:
        """Draw both factors and their masks, such that the product has a dense one's variance."""
        super().reset_parameters(std)
        self.first.reset_parameters(self.in_features**-0.5)
        self.second.reset_parameters(std * (self.in_features / self.first.out_features) ** 0.5)

    @property
    def scheduled(self) -> bool:
        """Whether the masks change."""
        return self.first.scheduled

    def step(self, progress: float | None = None) -> None:
        """Move the masks of both."""
        super().step(progress)
        self.first.step(progress)
        self.second.step(progress)


class DopedMatrix(Matrix):
    """``W = S + U V``, S pruned, the product of low rank: *sparse doped*."""

    def __init__(self, in_features: int, out_features: int, bias: bool, options: Doped) -> None:
        super().__init__(in_features, out_features, bias)
        rank = options.rank_of(in_features, out_features)
        self.sparse = PrunedMatrix(in_features, out_features, False, options)
        self.first = nn.Parameter(torch.empty(rank, in_features))
        self.second = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Add what both parts make of it."""
        output: Tensor = self.sparse(x)
        return output + linear(linear(x, self.first), self.second, self.bias)

    def dense(self) -> Tensor:
        """Add the parts."""
        return self.sparse.dense() + self.second @ self.first

    def cost(self) -> Cost:
        """What counts of the sparse part is active, and all of the factors."""
        numbers = self.first.numel() + self.second.numel()
        return _sum(self, self.sparse.cost(), self._cost(numbers, numbers, numbers), biases=False)

    def reset_parameters(self, std: float) -> None:
        """Draw both parts, each with half of a dense matrix's variance."""
        super().reset_parameters(std)
        half = std * 0.5**0.5
        self.sparse.reset_parameters(half)
        nn.init.normal_(self.first, std=self.in_features**-0.5)
        nn.init.normal_(self.second, std=half * (self.in_features / len(self.first)) ** 0.5)

    @property
    def scheduled(self) -> bool:
        """Whether the mask changes."""
        return self.sparse.scheduled

    def step(self, progress: float | None = None) -> None:
        """Move the mask."""
        super().step(progress)
        self.sparse.step(progress)


class ParallelMatrix(Matrix):
    """``W = [S S … S]``, S = Σ_j S_j, each pruned: *sparse parallel*, behind its units.

    The sum of k units, ``h = Σ_j f(W_j x)``, is what it reads: so a block of ``k d_ff`` neurons is
    the paper's of ``d_ff``, and any dense block that has this matrix computes the same.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, options: Parallel) -> None:
        super().__init__(in_features, out_features, bias)
        self.count = options.count
        check_multiple("matrices.branches", self.count, in_features)
        width = in_features // self.count
        check_multiple("matrices.block", options.block, width)
        self.branches = nn.ModuleList(
            PrunedMatrix(width, out_features, False, options) for _ in range(self.count)
        )
        self._packing = Packing()

    def forward(self, x: Tensor) -> Tensor:
        """Add up the neurons and the branches, and multiply once.

        In evaluation the sum of the branches is kept.
        """
        parts = [t for each in self._pruned() for t in (each.latent, *each.buffers())]
        made_of = settled(self, x, parts)
        added = self._added() if made_of is None else self._packing.whole(made_of, self._added)
        return linear(x.unflatten(-1, (self.count, -1)).sum(dim=-2), added, self.bias)

    def train(self, mode: bool = True) -> Self:
        """Forget the sum in training, which changes the weights."""
        if mode:
            self._packing.clear()
        return super().train(mode)

    def dense(self) -> Tensor:
        """Add up the branches, for each of the neurons."""
        return self._added().repeat(1, self.count)

    def _added(self) -> Tensor:
        return torch.stack([branch.dense() for branch in self._pruned()]).sum(dim=0)

    def _pruned(self) -> list[PrunedMatrix]:
        return [branch for branch in self.branches if isinstance(branch, PrunedMatrix)]

    def cost(self) -> Cost:
        """What counts of each branch is active; they are added up before they are multiplied."""
        costs = [branch.cost() for branch in self._pruned()]
        total = sum(cost.total_parameters for cost in costs)
        active = sum(cost.active_parameters for cost in costs)
        return self._cost(total, active, total // self.count)

    def reset_parameters(self, std: float) -> None:
        """Draw the branches such that their sum has a dense matrix's variance."""
        super().reset_parameters(std)
        for branch in self._pruned():
            branch.reset_parameters(std * self.count**-0.5)

    @property
    def scheduled(self) -> bool:
        """Whether the masks change."""
        return self._pruned()[0].scheduled

    def step(self, progress: float | None = None) -> None:
        """Move the masks."""
        super().step(progress)
        for branch in self._pruned():
            branch.step(progress)


def _sum(matrix: Matrix, one: Cost, other: Cost, biases: bool = True) -> Cost:
    """Add up the costs of two parts, and the bias of the whole if it is in neither."""
    both = [a + b for a, b in zip(astuple(one), astuple(other), strict=True)]
    if biases and matrix.bias is not None:
        count = matrix.out_features
        size = count * matrix.bias.element_size()
        both = [both[0] + count, both[1] + count, both[2], both[3] + size]
    return Cost(*both)
