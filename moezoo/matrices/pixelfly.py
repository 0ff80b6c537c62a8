"""Matrices of few blocks, laid out as butterflies, beside a product of low rank.

Dao et al. 2021, "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network
Models" (arXiv:2112.00029). A matrix is cut into n × n blocks, n a power of two. Butterfly factor f
joins each row j of blocks with columns j and ``j xor 2^f``; the sum of the first k factors, with
one diagonal for all, is *flat*: k + 1 blocks in every row and every column. To it a product of low
rank is added, γ and 1 - γ of them, γ learned.

Shapes: N rows of blocks, C blocks in each, I inputs and O outputs of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.cost import Cost
from moezoo.matrices.blocks import by_blocks
from moezoo.matrices.matrix import Matrix
from moezoo.matrices.options import Pixelfly
from moezoo_kernels.linear import linear


class PixelflyMatrix(Matrix):
    """``W = γ B + (1 - γ) U V``, B a flat block butterfly."""

    def __init__(self, in_features: int, out_features: int, bias: bool, options: Pixelfly) -> None:
        super().__init__(in_features, out_features, bias)
        self.size = options.size
        self.strides = [0, *(2**f for f in range(options.factors))]
        rank = options.rank_of(in_features, out_features)
        inputs, outputs = in_features // self.size, out_features // self.size
        self.blocks = nn.Parameter(torch.empty(self.size, outputs, len(self.strides) * inputs))
        self.first = nn.Parameter(torch.empty(rank, in_features))
        self.second = nn.Parameter(torch.empty(out_features, rank))
        if options.mix == "learned":
            # Not a scalar, which FSDP2 could not shard.
            self.mix: nn.Parameter | None = nn.Parameter(torch.empty(1))
        else:
            self.register_parameter("mix", None)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by all blocks of a row at once, and go through the narrow middle."""
        share = self._share()
        parts = x.unflatten(-1, (self.size, -1))
        read = parts.index_select(-2, self._columns(x.device).flatten()).flatten(-2)
        made = by_blocks(read, share * self.blocks)
        return made + linear(linear(x, self.first), (1.0 - share) * self.second, self.bias)

    def dense(self) -> Tensor:
        """Lay the blocks where they belong, and add the product."""
        share = self._share()
        blocks_NCOI = self.blocks.unflatten(-1, (len(self.strides), -1)).transpose(1, 2)
        columns_NC = self._columns(blocks_NCOI.device)
        rows_N1 = torch.arange(self.size, device=columns_NC.device).unsqueeze(-1)
        whole = blocks_NCOI.new_zeros(self.size, self.size, *blocks_NCOI.shape[2:])
        whole = whole.index_put((rows_N1, columns_NC), blocks_NCOI)
        butterfly = whole.transpose(1, 2).reshape(self.out_features, self.in_features)
        return share * butterfly + (1.0 - share) * (self.second @ self.first)

    def _columns(self, device: torch.device) -> Tensor:
        """Return where the blocks of each row are, ``(N, C)``."""
        rows_N = torch.arange(self.size, device=device)
        return torch.stack([rows_N ^ stride for stride in self.strides], dim=-1)

    def _share(self) -> Tensor | float:
        """Return γ."""
        return 0.5 if self.mix is None else self.mix

    def cost(self) -> Cost:
        """All numbers of blocks and factors are active; so is γ, which takes no product."""
        numbers = self.blocks.numel() + self.first.numel() + self.second.numel()
        held = numbers + (0 if self.mix is None else 1)
        return self._cost(held, held, numbers)

    def reset_parameters(self, std: float) -> None:
        """Draw the blocks and both factors, such that each part has half of the variance.

        The public code's parts, mixed half and half, keep half of a dense matrix's in all.
        """
        super().reset_parameters(std)
        part = std * 2**0.5
        nn.init.normal_(self.blocks, std=part * (self.size / len(self.strides)) ** 0.5)
        nn.init.normal_(self.first, std=self.in_features**-0.5)
        nn.init.normal_(self.second, std=part * (self.in_features / len(self.first)) ** 0.5)
        if self.mix is not None:
            nn.init.constant_(self.mix, 0.5)
