"""Layers whose answers blocks add, called for one token per sequence with what they ask for.

These are feed-forward blocks without a step of their own, and the memories beside them. What they
read of earlier tokens is kept here: the ids, and what a convolution has found.

Shapes: B sequences, L positions so far, D hidden_size, W width of what is remembered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from moezoo.feed_forward import FeedForward


class Told(NamedTuple):
    """What a step tells the layers of its tokens.

    Attributes:
        ids: ``(B, 1)`` int64, the tokens.
        positions: ``(B, 1)`` int64, how many of their text come before them.
        all_ids: ``(B, L)`` int64, those before them too, if a layer asks for these.
        all_mask: ``(B, L)`` bool, true at real tokens; None if all are.
        embeddings: ``(B, 1, D)``, as they enter the first block, if a layer asks for these.
    """

    ids: Tensor
    positions: Tensor
    all_ids: Tensor | None
    all_mask: Tensor | None
    embeddings: Tensor | None


class Remembered:
    """A history with room for all that is to come, in which nothing is moved.

    Args:
        earlier: ``(B, E, W)``, of the last tokens of the prompts.
        new_tokens: so many steps follow at most.
    """

    def __init__(self, earlier: Tensor, new_tokens: int) -> None:
        batch, self._end, width = earlier.shape
        self._values = earlier.new_empty(batch, self._end + new_tokens, width)
        self._values[:, : self._end] = earlier

    def __call__(self, values: Tensor, reach: int) -> Tensor:
        """Append the values of a step, ``(B, 1, W)``, and return them behind earlier ones."""
        begin, end = max(0, self._end - reach), self._end + values.shape[1]
        self._values[:, self._end : end] = values
        self._end = end
        return self._values[:, begin:end]


class Added:
    """A layer, and its history if it reads one.

    Args:
        layer: in evaluation mode.
    """

    def __init__(self, layer: FeedForward) -> None:
        self.layer = layer
        self._history: Remembered | None = None

    def remember(self, earlier: Tensor, new_tokens: int) -> None:
        """Begin the history, with the values of the prompts' last tokens, ``(B, E, W)``."""
        self._history = Remembered(earlier, new_tokens)

    def answer(self, read: Tensor, told: Told) -> Tensor:
        """Return what the layer adds, ``(B, D)``.

        Args:
            read: ``(B, D)``, what it reads.
            told: of the step's tokens.
        """
        found: Tensor = self.layer.infer(read[:, None], **self._given(told))
        return found[:, 0]

    def feed(
        self, read: Tensor, told: Told, router_input: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a feed-forward block adds, ``(B, D)``, and the routers' state behind it.

        Args:
            read: ``(B, D)``, what it reads.
            told: of the step's tokens.
            router_input: ``(B, D)``, what its router reads, if not that.
            state: ``(B, 1, R)``, what the router of the block before handed on, if one did.
        """
        layer, given = self.layer, self._given(told)
        if router_input is not None:
            given["router_input"] = router_input[:, None]
        if layer.reads_router_state:
            given["router_state"] = state
        if not layer.router_state_width:
            found: Tensor = layer.infer(read[:, None], **given)
            return found[:, 0], state
        output = layer(read[:, None], **given)
        handed = state if output.router_state is None else output.router_state
        return output.hidden[:, 0], handed

    def _given(self, told: Told) -> dict[str, Any]:
        layer = self.layer
        given: dict[str, Any] = {"token_ids": told.ids}
        if layer.needs_earlier_tokens:
            given = {"token_ids": told.all_ids, "mask": told.all_mask}
        if layer.reads_positions:
            given["positions"] = told.positions
        if layer.reads_embeddings:
            given["embeddings"] = told.embeddings
        if layer.keeps_history:
            given["history"] = self._history
        return given
