"""What one call leaves for another, where a model calls the two apart."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_COMPILED = 0  # no thread has this number


class Aside:
    """A tensor that a thread puts aside, and takes again; threads do not see each other's.

    Compilers cannot ask for the thread: what a compiled graph puts aside is taken by whoever is
    next, which within one graph is the graph itself.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def put(self, tensor: Tensor | None) -> None:
        """Keep a tensor, in place of an earlier one; None to forget that."""
        place = _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
        if tensor is not None:
            self._kept[place] = tensor
        elif place in self._kept:
            del self._kept[place]

    def look(self) -> Tensor:
        """Return the tensor, which has been put aside before."""
        if torch.compiler.is_compiling():
            return self._kept[_COMPILED]
        found = self._kept.get(threading.get_ident())
        return self._kept[_COMPILED] if found is None else found
