"""One sparsity for all layers of a model: what ReMoE's coefficient λ follows in the paper.

Layers that are built together share a :class:`SparsityScope`. Each keeps its own λ, which its state
dict has; they begin at their options' value and move alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from moezoo.routing import losses as L
from moezoo.routing.balance_options import BalanceOptions


class SparsityScope:
    """What all layers of a model say of the sparsity in one optimizer step.

    Attributes:
        layers: how many share it.
    """

    def __init__(self) -> None:
        self.layers = 0
        self._excess: Tensor | None = None
        self._direction: Tensor | None = None

    def add(self, stats: Mapping[str, Tensor], top_k: int) -> None:
        """Add one micro-batch of one layer: how many more experts ran than k per token.

        It is divided by the layer's number of experts: layers count by the share that ran.
        """
        if self._direction is not None:  # the first of the next step
            self.forget()
        counts_E = stats["expert_counts"].detach()
        excess = (counts_E.sum() - top_k * stats["tokens"].detach()).float() / len(counts_E)
        self._excess = excess if self._excess is None else self._excess + excess

    def direction(self) -> Tensor | None:
        """Return which way every λ goes, 1, 0 or -1, over all ranks; None if there is nothing yet.

        All ranks call it together. It stays the same for all layers of a step.
        """
        if self._direction is None and self._excess is not None:
            self._direction = L.sum_over_ranks(self._excess).sign()
        return self._direction

    def forget(self) -> None:
        """Forget the step."""
        self._excess = self._direction = None


_SCOPE: ContextVar[SparsityScope | None] = ContextVar("moezoo_sparsity_scope", default=None)


@contextmanager
def shared_sparsity() -> Iterator[None]:
    """Share one scope among the layers built inside that ask for the model's."""
    token = _SCOPE.set(SparsityScope())
    try:
        yield
    finally:
        _SCOPE.reset(token)


def joined_scope(balance: BalanceOptions) -> SparsityScope | None:
    """Return the scope that a layer with relu scores joins, its own where it is built alone.

    None where its λ follows its own sparsity.
    """
    if balance.sparsity_scope == "layer":
        return None
    scope = _SCOPE.get() or SparsityScope()
    scope.layers += 1
    return scope
