"""What a layer is given beside the hidden states, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Place = Literal["before_attention", "after_feed_forward"]
"""Where a block adds what a layer answers to its residual stream, beside its feed-forward block."""


class FeedForwardOutput(NamedTuple):
    """The output of a layer.

    Attributes:
        hidden: ``(..., d_model)``, in the dtype of the input (or of autocast).
        losses: scalars in fp32, already weighted; the model adds them to its loss.
        stats: detached: counts, entropy, usage, drops; outside training computed when first read.
        router_state: ``(..., R)`` in fp32 or wider, what the router hands on to that of the next
            layer; None if it hands on nothing.
    """

    hidden: Tensor
    losses: dict[str, Tensor]
    stats: Mapping[str, Tensor]
    router_state: Tensor | None = None


class History(Protocol):
    """What a layer has computed of the tokens before those of a call, in cached generation."""

    def __call__(self, values: Tensor, reach: int) -> Tensor:
        """Append the values of this call's tokens, and return them behind earlier ones.

        Args:
            values: ``(B, S, W)``.
            reach: how many tokens before one are read, the same in every call.

        Returns:
            ``(B, E + S, W)``, with E of at most ``reach`` earlier tokens.
        """


class TokenContext(NamedTuple):
    """The inputs of a layer beside the hidden states; see :meth:`moezoo.FeedForward.forward`."""

    token_ids: Tensor | None = None
    router_input: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    history: History | None = None
    router_state: Tensor | None = None
