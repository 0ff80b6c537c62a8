"""Blocks whose router adds up a state over layers, which the model hands from block to block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moezoo_models.adapters.torch import has_forward_hooks
from moezoo_models.adopt.holding import Held


class HeldCarrying(Held):
    """A layer in the place of a block that takes a state, and returns one beside its answer.

    The state is handed on in the dtype that the block has it in, so that blocks which were left out
    read it as before.
    """

    def __call__(
        self, hidden_states: Tensor, state: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the answer and the state that the block would."""
        self.bind()
        self.refuse_dropout()
        read = {"router_state": state} if self.layer.reads_router_state else {}
        output = self.layer(hidden_states, **read)
        assert output.router_state is not None
        block: Any = self.block
        router = getattr(block, self.entry.router_at)
        if has_forward_hooks(router):  # somebody records its logits
            router(hidden_states, state)
        handed = output.router_state.to(router.down_proj.weight.dtype)
        return self.caught_of(output), handed

    def try_out(self, hidden: Tensor) -> Tensor:
        """Compute what the block does with a state, and what it hands on."""
        return self._folded(self, hidden)

    def theirs(self, hidden: Tensor) -> Tensor:
        """Compute the same by the block's own forward pass."""
        block = self.block
        return self._folded(lambda *given: type(block).forward(block, *given), hidden)

    def _folded(self, call: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Add the state that a call returns to its answer: a mistake in either is to show."""
        width = self.layer.router_state_width
        answer, handed = call(hidden, given_state(hidden, width))
        folded: Tensor = answer + handed.mean(dim=-1, keepdim=True)
        return folded


def given_state(hidden: Tensor, width: int) -> Tensor:
    """Return a state ``(..., width)`` that follows from hidden states, with a gradient."""
    turned = 0.5 * hidden.flip(-1)
    repeats = -(-width // hidden.shape[-1])
    return turned.repeat(*(1,) * (hidden.ndim - 1), repeats)[..., :width]
