"""What a layer reads beside the hidden states of a call, as whoever calls it may ask."""

from __future__ import annotations

from typing import ClassVar

from moezoo.training_state import TrainingState


class ReadsContext(TrainingState):
    """A layer that reads nothing beside the hidden states, until it says otherwise.

    Attributes:
        needs_token_ids: whether a call without ``token_ids`` raises; true where routing reads them.
        reads_router_input: whether ``router_input`` decides which experts a token is routed to.
        reads_positions: whether ``positions`` change anything; only such layers are given them.
        reads_embeddings: whether ``embeddings`` change anything; only such layers are given them.
    """

    needs_token_ids: ClassVar[bool] = False
    reads_router_input: ClassVar[bool] = False
    reads_positions: ClassVar[bool] = False
    reads_embeddings: ClassVar[bool] = False

    @property
    def needs_earlier_tokens(self) -> bool:
        """Whether ``token_ids`` must reach back to the first token, in cached generation too.

        Such a layer takes ``token_ids`` (and ``mask``) of more tokens than ``hidden`` has: all so
        far, the last of which are those of ``hidden``.
        """
        return False

    @property
    def keeps_history(self) -> bool:
        """Whether cached generation must give the layer a ``history``."""
        return False

    @property
    def reads_router_state(self) -> bool:
        """Whether ``router_state`` changes anything; only such layers are given it."""
        return False

    @property
    def router_state_width(self) -> int:
        """The width R of the ``router_state`` that a call returns; 0 if it returns none."""
        return 0
