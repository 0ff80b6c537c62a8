"""Matrices that are products of smaller factors, and their training beside a dense guide.

Wei et al. 2024, "Building on Efficient Foundations: Effectively Training LLMs with Structured
Feedforward Layers" (arXiv:2406.16450). With b blocks, r the width between two factors and m the
narrower side:

- low rank: ``U V``, ``r (in + out)`` numbers;
- block dense: U dense, B of blocks ``(r/b, in/b)``: ``in r / b + r out``;
- block shuffle: blocks ``(m/b, in/b)``, then ``(out/b, m/b)``: ``m (in + out) / b``. Between them,
  and after them, number l of block k becomes number k of group l.

A guide is a dense matrix that starts as the product of the factors. In training the output is
``α W_guide x + (1 - α) W x``, where α falls from 1 to 0 (section 3.3); elsewhere it is ``W x``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.cost import Cost
from moezoo.matrices import shuffles
from moezoo.matrices.blocks import by_blocks
from moezoo.matrices.matrix import Matrix
from moezoo.matrices.options import BlockDense, BlockShuffle, LowRank
from moezoo.matrices.schedules import cosine_tensor
from moezoo_kernels.activations import GLUOptions
from moezoo_kernels.linear import linear

_LEAST_TOKENS = 16
"""Of fewer, the numbers of one output fill no register."""


class Factored(Matrix):
    """A product of two factors, perhaps with a guide.

    Args:
        in_features: as of :class:`Matrix`, and likewise out_features and bias.
        out_features: as there.
        bias: as there.
        first: shape of the factor that is applied first.
        second: shape of the other.
        until: share of the run that is guided; 0: none.
    """

    progress: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        first: tuple[int, ...],
        second: tuple[int, ...],
        until: float,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.first = nn.Parameter(torch.empty(first))
        self.second = nn.Parameter(torch.empty(second))
        self.until = until
        if until:
            self.guide = nn.Parameter(torch.empty(out_features, in_features))
            self.register_buffer("progress", torch.zeros((), dtype=torch.float32))
        self._ended = False  # spares the guide's product; no number depends on it

    def product(self, x: Tensor) -> Tensor:
        """Apply the factors one after the other, without the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factors, and in training the guide for its part."""
        output = self.product(x)
        if self.training and self.until:
            if self._ended:  # a gradient of zero: a parameter without any would stop DDP
                output = output + 0.0 * self.guide[0, 0]
            else:
                share = self.guided_share()
                output = share * linear(x, self.guide) + (1.0 - share) * output
        return output if self.bias is None else output + self.bias

    def reference(self, x: Tensor) -> Tensor:
        """Multiply the rows of one dense matrix, the guide's part included."""
        dense = self.dense()
        if self.training and self.until:
            share = self.guided_share()
            dense = share * self.guide + (1.0 - share) * dense
        return self._row_by_row(x, dense)

    def guided_share(self) -> Tensor:
        """Return α at the step that is being computed."""
        return cosine_tensor(self.progress, self.until)

    def cost(self) -> Cost:
        """All numbers of the factors are active; a guide counts in the total alone."""
        numbers = self.first.numel() + self.second.numel()
        guide = self.in_features * self.out_features if self.until else 0
        return self._cost(numbers + guide, numbers, numbers)

    def reset_parameters(self, std: float) -> None:
        """Draw the factors, and set the guide to their product."""
        super().reset_parameters(std)
        self._draw(std)
        if self.until:
            with torch.no_grad():
                self.guide.copy_(self.dense())
                self.progress.zero_()
            self._ended = False

    def _draw(self, std: float) -> None:
        """Set each factor to the nearest orthogonal one to a random draw, ``U Vᵀ`` of each block.

        It keeps lengths where it does not narrow. The second is then scaled as ``std`` asks: by
        1 if that is the usual ``in_features ** -0.5``.
        """
        with torch.no_grad():
            for factor in (self.first, self.second):
                left, _, right = torch.linalg.svd(_normal_like(factor), full_matrices=False)
                factor.copy_(left @ right)
            self.second.mul_(std * self.in_features**0.5)

    @property
    def scheduled(self) -> bool:
        """Whether there is a guide."""
        return self.until > 0

    @torch.no_grad()
    def step(self, progress: float | None = None) -> None:
        """Lower the guide's share, which never rises again: later runs train the factors alone."""
        super().step(progress)
        if progress is not None and self.until:
            self.progress.clamp_(min=progress)
            self._ended = bool(self.progress >= self.until)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._ended = False  # until a step says otherwise
        super()._load_from_state_dict(*args, **kwargs)


class LowRankMatrix(Factored):
    """``W = second first``, both dense."""

    def __init__(self, in_features: int, out_features: int, bias: bool, options: LowRank) -> None:
        rank = options.rank_of(in_features, out_features)
        super().__init__(
            in_features,
            out_features,
            bias,
            first=(rank, in_features),
            second=(out_features, rank),
            until=options.guide,
        )
        self.init = options.init

    def product(self, x: Tensor) -> Tensor:
        """Go through the narrow middle."""
        return linear(linear(x, self.first), self.second)

    def dense(self) -> Tensor:
        """Multiply the factors."""
        return self.second @ self.first

    def _draw(self, std: float) -> None:
        """Split the largest singular values of a dense draw evenly, or draw both factors.

        The former's output has the share of a dense one's variance that those values have of the
        sum of squares, 0.43 for rank 128 of 512 × 2048.
        """
        rank = len(self.first)
        with torch.no_grad():
            if self.init == "normal":
                nn.init.normal_(self.first, std=self.in_features**-0.5)
                nn.init.normal_(self.second, std=std * (self.in_features / rank) ** 0.5)
                return
            drawn = std * _normal_like(self.first.new_empty(self.out_features, self.in_features))
            left, values, right = torch.linalg.svd(drawn, full_matrices=False)
            roots = values[:rank].sqrt()
            self.first.copy_(roots[:, None] * right[:rank])
            self.second.copy_(left[:, :rank] * roots)


class BlockDenseMatrix(Factored):
    """``W = second blockdiag(first)``."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, options: BlockDense
    ) -> None:
        blocks, rank = options.blocks, options.rank_of(in_features, out_features)
        super().__init__(
            in_features,
            out_features,
            bias,
            first=(blocks, rank // blocks, in_features // blocks),
            second=(out_features, rank),
            until=options.guide,
        )

    def product(self, x: Tensor) -> Tensor:
        """Apply every block to its part of the input, then the dense factor to all."""
        return linear(by_blocks(x, self.first), self.second)

    def dense(self) -> Tensor:
        """Lay the blocks on a diagonal, and multiply."""
        return self.second @ torch.block_diag(*self.first)


class BlockShuffleMatrix(Factored):
    """``W = P blockdiag(second) P blockdiag(first)``."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, options: BlockShuffle
    ) -> None:
        blocks, middle = options.blocks, min(in_features, out_features)
        super().__init__(
            in_features,
            out_features,
            bias,
            first=(blocks, middle // blocks, in_features // blocks),
            second=(blocks, out_features // blocks, middle // blocks),
            until=options.guide,
        )

    def product(self, x: Tensor) -> Tensor:
        """Apply blocks, shuffle, apply blocks, shuffle."""
        x_TD = x.reshape(-1, self.in_features)
        run = shuffles.product if shuffles.runs_here(x) else shuffles.plain
        return run(x_TD, self.factors).contiguous().reshape(*x.shape[:-1], self.out_features)

    @property
    def factors(self) -> shuffles.Factors:
        """What it is made of."""
        return shuffles.Factors(self.first, self.second, self.bias)

    @property
    def guided(self) -> bool:
        """Whether a guide has a part in the output, or would have one."""
        return self.training and self.until > 0

    def dense(self) -> Tensor:
        """Lay the blocks on diagonals, reorder their rows, and multiply."""
        first, second = (
            _shuffle_rows(torch.block_diag(*factor), len(factor))
            for factor in (self.first, self.second)
        )
        return second @ first


def shuffled_unit(
    gate: object, up: object, x: Tensor, activation: str, glu: GLUOptions
) -> Tensor | None:
    """Return ``act(gate) up`` in one pass over both, with the bounds of ``glu``.

    Args:
        gate: the projection whose output passes the activation.
        up: the other.
        x: ``(..., in_features)``.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        glu: bounds of the factors.

    Returns:
        ``(..., out_features)``; None where they are no block shuffles, where a guide has a part, or
        where another way is faster.
    """
    if not (isinstance(gate, BlockShuffleMatrix) and isinstance(up, BlockShuffleMatrix)):
        return None
    x_TD = x.reshape(-1, gate.in_features)
    here = shuffles.runs_here(x)
    if gate.guided or (here and len(x_TD) < _LEAST_TOKENS):
        return None
    run = shuffles.unit if here else shuffles.plain_unit
    made_TF = run(x_TD, gate.factors, up.factors, activation, glu)
    return made_TF.reshape(*x.shape[:-1], gate.out_features)


def _shuffle_rows(matrix: Tensor, blocks: int) -> Tensor:
    """Move row l of block k to row k of group l."""
    return matrix.unflatten(0, (blocks, -1)).transpose(0, 1).flatten(0, 1)


def _normal_like(tensor: Tensor) -> Tensor:
    """Draw a tensor of that shape from N(0, 1), in a dtype that has an SVD."""
    return torch.randn_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
