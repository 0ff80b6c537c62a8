"""Random routing: the ablation that says how much of a method's gain its routing is.

The method stays as it is, its parameters, initial weights, losses and cost included, but the choice
of experts does not depend on the token's content. Where a vector chooses, fresh Gaussian noise
is the ``router_input``; where the token's id chooses, a fresh id is drawn uniformly. Those that are
chosen still read the hidden state. A method whose routing has learned something is better than its
own ablation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_int
from moezoo.feed_forward import Cost, FeedForward, FeedForwardOutput, ParameterGroup, TokenContext


class RandomRouting(FeedForward):
    """A layer of the zoo whose routing reads noise instead of the token.

    In training every token of every call gets noise of its own, from torch's global generator. In
    evaluation the noise is drawn anew from ``seed`` in each call, so that the same call gives the
    same output: tokens of one call differ in their noise, calls of one shape do not.

    Args:
        layer: the method. It is used as it is, not copied.
        norm: what normalises the hidden states before the layer; the noise goes through it too, so
            that it has the scale of what the routing would have read. Not registered, as it belongs
            to the model, and given no gradient. Default: none, noise of unit variance.
        seed: of the noise in evaluation; give each layer of a model another.

    Raises:
        InputError: the layer chooses nothing, so that there is nothing to make random.
    """

    def __init__(self, layer: FeedForward, norm: nn.Module | None = None, seed: int = 0) -> None:
        super().__init__(layer.d_model)
        if not can_be_random(layer):
            raise InputError(
                f"layer: {type(layer).__name__} chooses nothing per token; "
                "there is no routing to make random"
            )
        self.layer = layer
        self.seed = check_int("seed", seed, minimum=0)
        # Inside a tuple a module is not registered: it is the model's to hold, save and move.
        self._norm = (norm,)

    @property
    def causal(self) -> bool:
        """As the layer: random choices may still compete for an expert's room."""
        return self.layer.causal

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Apply the layer with random choices; ``token_ids`` and ``router_input`` are not read."""
        layer = self.layer.reference if brute_force else self.layer
        return layer(hidden, mask=context.mask, **self._random_choice(hidden))

    @torch.no_grad()
    def _random_choice(self, hidden: Tensor) -> dict[str, Tensor]:
        """Draw what stands for the content: ``router_input`` or ``token_ids``."""
        generator = None
        if not self.training:
            generator = torch.Generator(hidden.device).manual_seed(self.seed)
        if not self.layer.reads_router_input:
            vocabulary: Any = self.layer.vocab_size
            shape, device = hidden.shape[:-1], hidden.device
            ids = torch.randint(vocabulary, shape, generator=generator, device=device)
            return {"token_ids": ids}
        noise = torch.randn(
            hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype
        )
        (norm,) = self._norm
        return {"router_input": noise if norm is None else norm(noise).to(hidden.dtype)}

    def cost(self) -> Cost:
        """As the layer: what the choice reads changes no formula."""
        return self.layer.cost()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise the layer."""
        self.layer.reset_parameters(num_layers)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Group as the layer does."""
        return self.layer.parameter_groups()

    def config(self) -> dict[str, Any]:
        """Describe the ablation. It is no method: ``from_config`` does not build it again."""
        arguments = {"layer": self.layer.config(), "seed": self.seed}
        return {"class_path": "moezoo.random_routing.RandomRouting", "init_args": arguments}


def can_be_random(layer: FeedForward) -> bool:
    """Return whether a layer chooses by content at all: by a vector, or by the token's id."""
    by_token = layer.needs_token_ids and hasattr(layer, "vocab_size")
    return layer.reads_router_input or by_token
