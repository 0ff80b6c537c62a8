"""The decoder's cache as transformers' models take one: a pass writes over what is there.

Shapes: B sequences, G key-value heads, S tokens of the pass, L positions, C head_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, of which the first ``begin`` count as those of earlier tokens.

    Of a layer with a sliding window only what the window reaches is read: what stands before it in
    a prompt was never filled in.

    Args:
        keys: ``(B, G, L, C)``, written in place.
        values: of the same shape.
        begin: where the tokens of the pass go.
        window: positions that a token sees, itself included; None for all.
    """

    def __init__(self, keys: Tensor, values: Tensor, begin: int, window: int | None) -> None:
        super().__init__()
        self.keys, self.values, self._begin = keys, values, begin
        self.is_sliding = window is not None
        self._first = 0 if window is None else max(0, begin + 1 - window)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values; return all that it reads, ``(B, G, read, C)``."""
        assert self.keys is not None
        assert self.values is not None
        count = key_states.shape[2]
        self.keys.narrow(2, self._begin, count).copy_(key_states)
        self.values.narrow(2, self._begin, count).copy_(value_states)
        read, first = self.get_mask_sizes(count)
        return self.keys.narrow(2, first, read), self.values.narrow(2, first, read)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a pass of so many tokens reads, and the first one's place."""
        return self._begin + query_length - self._first, self._first

    def get_seq_length(self) -> int:
        """Return how many tokens stand before the pass."""
        return self._begin

    def get_max_length(self) -> int:
        """Return how many tokens there is room for."""
        assert self.keys is not None
        return self.keys.shape[2]
