"""What all converted layers have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moezoo.convert.plan import Projection


@dataclass(frozen=True)
class Mixture:
    """Facts common to all converted layers, known before any of them is planned.

    Attributes:
        num_experts: routed experts N.
        top_k: of them per token.
        d_expert: neurons of a routed expert.
        d_shared: neurons of the shared expert, 0 without.
        weighting: as in :class:`~moezoo.convert.LayerPlan`.
        layers: numbers of the converted layers.
        d_model: width of the model.
        dtype: of the dense blocks, and of what they become.
        neuron_router: whether experts are scored by neurons (CMoE) instead of linearly.
        signed: whether those neurons' activations keep their sign.
        output_bias: whether a bias is added to the output, once for all experts.
        activation: of the dense blocks, by our name.
        gated: whether they are gated linear units.
        bias: whether their projections have biases.
        reads_shared: whether the router reads the shared expert's activations too.
        top_ks: ``top_k`` of each of ``layers``, where they differ; None where they do not.
    """

    num_experts: int
    top_k: int
    d_expert: int
    d_shared: int
    weighting: str
    layers: tuple[int, ...]
    d_model: int
    dtype: torch.dtype
    neuron_router: bool = False
    signed: bool = False
    output_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    reads_shared: bool = False
    top_ks: tuple[int, ...] | None = None

    @property
    def inner(self) -> tuple[Projection, ...]:
        """The projections before the activation."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def d_router(self) -> int:
        """Width of what a router reads."""
        return self.d_model + (self.d_shared if self.reads_shared else 0)

    def top_k_of(self, layer: int) -> int:
        """Return how many experts a token is routed to in a layer."""
        return self.top_k if self.top_ks is None else self.top_ks[self.layers.index(layer)]

    def work(self, width: int) -> float:
        """Return FLOPs per token over those of the dense blocks of ``width``, routers included."""
        used = [self.d_shared + self.top_k_of(layer) * self.d_expert for layer in self.layers]
        return (sum(used) / len(used) + self.router_neurons) / width

    @property
    def router_neurons(self) -> float:
        """How many neurons take as many FLOPs as a router does."""
        router = self.num_experts * self.d_router * (2 if self.neuron_router else 1)
        return router / ((len(self.inner) + 1) * self.d_model)

    def shape(self, projection: Projection, width: int) -> tuple[int, int]:
        """Return the shape of an expert's projection, if it has ``width`` neurons."""
        if projection == "down":
            return self.d_model, width
        return width, self.d_model
