"""Mixtures that a decoder layer runs itself: a router and experts, and no block around them.

In Gemma 4 the router reads the residual stream, the experts a norm of it, and what the layer does
around them is its own. So both keep their places, and their ``forward`` is ours: the router's, to
see what it reads, and the experts', to compute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moezoo.layers.sparse_moe import SparseMoE
from moezoo_models.adopt.aside import Aside
from moezoo_models.adopt.block import Block
from moezoo_models.adopt.holding import Held, Shared


class RouterAndExperts(nn.Module):
    """A router and experts of a layer, as a block that can be tried out by itself.

    Args:
        layer: the layer that has both; they stay its own.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts
        self.stands_for = f"{type(layer).__module__}.{type(layer).__qualname__}"
        self.training = layer.training

    @property
    def title(self) -> str:
        """The class of the layer."""
        return self.stands_for.rpartition(".")[2]

    def forward(self, hidden: Tensor) -> Tensor:
        """Route by hidden states, and let experts read others, as the layer does."""
        read = hidden.flatten(0, -2)
        _, weights, indices = self.router(read)
        answer: Tensor = self.experts(what_experts_read(read), indices, weights)
        return answer.reshape(hidden.shape)


def what_experts_read(hidden: Tensor) -> Tensor:
    """Return other hidden states than a router reads: a mistake between the two is to show."""
    return 0.5 * hidden.flip(-1)


class HeldInLayer(Held):
    """A layer that computes in place of experts, and routes by what their router was given."""

    def __init__(
        self, block: nn.Module, entry: Block, layer: SparseMoE, shared: list[Shared]
    ) -> None:
        super().__init__(block, entry, layer, shared)
        self._router_input = Aside()

    def parts(self) -> dict[nn.Module, Any]:
        """Return the modules whose ``forward`` is replaced, each with what replaces it."""
        block: Any = self.block
        return {block.router: self.route, block.experts: self.compute}

    def bind(self) -> None:
        """Hand the layer the parameters as they are now."""
        block: Any = self.block
        block.training = block.experts.training
        super().bind()

    def route(self, hidden_states: Tensor) -> Any:
        """Route as the router does, for whoever records it, and keep what it read."""
        self._router_input.put(hidden_states)
        router: Any = self.block.router
        return type(router).forward(router, hidden_states)

    def compute(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the experts would."""
        self.bind()
        output = self.layer(hidden_states, router_input=self._router_input.look())
        self._router_input.put(None)
        return self.caught_of(output)

    def try_out(self, hidden: Tensor) -> Tensor:
        """Compute what :class:`RouterAndExperts` does."""
        read = hidden.flatten(0, -2)
        self.route(read)
        return self.compute(what_experts_read(read)).reshape(hidden.shape)
