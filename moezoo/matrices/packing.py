"""The packed copy of a sparse matrix, which evaluation multiplies with where that is faster.

It is made when it is first needed, and anew once the weights, the mask or anything else that the
matrix is computed from has changed, which torch counts for each tensor (but for changes through
``.data``). It is no part of a state dict, of copies of the module, or of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from moezoo_kernels.sparse_linear import (
    BLOCKS,
    MOST_GROUP,
    BlockSparse,
    GroupSparse,
    pack_blocks,
    pack_groups,
    pays,
)

Packed: TypeAlias = BlockSparse | GroupSparse


@dataclass(frozen=True)
class Pattern:
    """Where a matrix has zeros, if it has some: blocks of a width, or all but n of every m.

    Attributes:
        block: a multiple of the blocks' width that can be packed; 0 for groups.
        n: numbers of a group that count.
        m: numbers of a group.
    """

    block: int = 0
    n: int = 0
    m: int = 0

    def pack(self, dense: Tensor) -> Packed | None:
        """Return a matrix without its zeros; None where there is no such format."""
        if self.block:
            width = next((b for b in reversed(BLOCKS) if self.block % b == 0), None)
            return None if width is None else pack_blocks(dense, width)
        if self.m > MOST_GROUP or not 0 < self.n < self.m:
            return None
        most = int(dense.reshape(-1, self.m).ne(0).sum(dim=-1).amax())
        return pack_groups(dense, self.n, self.m) if most <= self.n else None


class _State(NamedTuple):
    """A tensor as it was: itself, an alias that keeps its memory, and how often it had changed."""

    tensor: Tensor
    memory: Tensor
    version: int

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is still what it was."""
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.memory.data_ptr()
        )


class Packing:
    """A packed copy, and what it was made of."""

    def __init__(self) -> None:
        self._made_of: list[_State] = []
        self._packed: Packed | None = None

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        """Copy nothing: a copy of the module packs anew."""
        return Packing, ()

    def clear(self) -> None:
        """Forget the copy."""
        self._made_of, self._packed = [], None

    def get(
        self, tensors: list[Tensor], tokens: int, pattern: Pattern, dense: Callable[[], Tensor]
    ) -> Packed | None:
        """Return the packed matrix if it is worth multiplying so many tokens with, else None.

        Args:
            tensors: what the matrix is computed from, the weights first.
            tokens: how many.
            pattern: where it has zeros.
            dense: computes the matrix.
        """
        same = len(tensors) == len(self._made_of) and all(
            state.is_of(tensor) for state, tensor in zip(self._made_of, tensors, strict=True)
        )
        if not same:
            # Under inference mode the copy could be saved for no later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                packed = pattern.pack(dense())
            # Of what never pays no copy is kept, only the note that it does not.
            self._packed = packed if packed is not None and pays(packed, 1) else None
            self._made_of = [_State(t, t.detach(), t._version) for t in tensors]
        packed = self._packed
        return packed if packed is not None and pays(packed, tokens) else None


def is_plain(*tensors: Tensor) -> bool:
    """Return whether tensors have memory, and count their changes: no stand-ins, no shards."""
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type in ("cpu", "cuda")
        and not t.is_inference()
        for t in tensors
    )
