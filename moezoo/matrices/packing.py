"""The copies of a sparse matrix that evaluation multiplies with: packed, or with its zeros.

Without its zeros it is multiplied with where that is faster. With them, masked or shrunk once and
not in every call, it is kept from the second call on: the prompt of a reply is worth no memory.

A copy is made when it is first needed, and anew once the weights, the mask or anything else that it
is computed from has changed, which torch counts for each tensor (but for changes through
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
    """Copies of a matrix, and what they were made of."""

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        """Copy nothing: a copy of the module packs anew."""
        return Packing, ()

    def clear(self) -> None:
        """Forget the copies."""
        self._made_of: list[_State] = []
        self._packed: Packed | None = None
        self._was_packed = False
        self._whole: Tensor | None = None
        self._whole_calls = 0

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
        self._follow(tensors)
        if not self._was_packed:
            packed = pattern.pack(_computed(dense))
            # Of what never pays no copy is kept, only the note that it does not.
            self._packed = packed if packed is not None and pays(packed, 1) else None
            self._was_packed = True
        packed = self._packed
        return packed if packed is not None and pays(packed, tokens) else None

    def whole(self, tensors: list[Tensor], dense: Callable[[], Tensor]) -> Tensor:
        """Return the matrix with its zeros, without a gradient.

        Args:
            tensors: as of :meth:`get`.
            dense: as there.
        """
        self._follow(tensors)
        if self._whole is not None:
            return self._whole
        made = _computed(dense)
        self._whole_calls += 1
        if self._whole_calls > 1:
            # Weights that are zero where a mask is, as pruned ones, take no copy.
            self._whole = tensors[0].detach() if torch.equal(made, tensors[0]) else made
        return made

    def _follow(self, tensors: list[Tensor]) -> None:
        """Forget the copies if they were made of others."""
        same = len(tensors) == len(self._made_of) and all(
            state.is_of(tensor) for state, tensor in zip(self._made_of, tensors, strict=True)
        )
        if not same:
            self.clear()
            self._made_of = [_State(t, t.detach(), t._version) for t in tensors]


def _computed(dense: Callable[[], Tensor]) -> Tensor:
    """Compute it such that a backward pass may keep it, which it may not under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return dense()


def settled(module: nn.Module, x: Tensor, tensors: list[Tensor]) -> list[Tensor] | None:
    """Return what a matrix is computed from where copies of it may be kept, else None.

    They may not in training, where one of the tensors wants a gradient, and in a graph that is
    compiled.

    Args:
        module: the matrix.
        x: what it multiplies.
        tensors: what it is computed from.
    """
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    if module.training or learns or torch.compiler.is_compiling():
        return None
    return tensors if is_plain(x, *tensors) else None


def is_plain(*tensors: Tensor) -> bool:
    """Return whether tensors have memory, and count their changes: no stand-ins, no shards."""
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type in ("cpu", "cuda")
        and not t.is_inference()
        for t in tensors
    )
