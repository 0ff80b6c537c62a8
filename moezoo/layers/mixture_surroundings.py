"""What surrounds a mixture's routed experts: maps to their width, norms, the shared expert.

Shapes: T tokens, D d_model, l the width that routed experts read and write.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from moezoo.experts.norms import InputNorm, OutputNorm
from moezoo.layers.dense import DenseFFN
from moezoo.layers.weighed import (
    Operands,
    operands_of,
    outputs_of,
    returned_tokens,
    weighed_shared,
)
from moezoo.routing import RouterOptions, Routing


class Surrounded(Protocol):
    """What is read here of a :class:`moezoo.SparseMoE`, which has parts only where options say."""

    num_experts: int
    num_identity_experts: int
    num_idle_experts: int
    d_latent: int | None
    shared_gate: bool
    router: RouterOptions
    input_norm: InputNorm | None
    output_norm: OutputNorm | None
    shared_expert: DenseFFN

    @property
    def latent_down(self) -> nn.Module:
        """The map to the experts' width."""

    @property
    def latent_up(self) -> nn.Module:
        """The map back."""

    @property
    def shared_expert_gate(self) -> nn.Module:
        """The map to the shared expert's gate."""


def norms_of(layer: Surrounded) -> list[InputNorm | OutputNorm]:
    """Return the norms before and after the routed experts, those that there are."""
    found: list[InputNorm | OutputNorm] = []
    if layer.input_norm is not None:
        found.append(layer.input_norm)
    if layer.output_norm is not None:
        found.append(layer.output_norm)
    return found


def to_experts(layer: Surrounded, tokens: Tensor, routing: Routing) -> Operands:
    """Return what the experts that compute get: tokens at their width, choices, weights.

    Args:
        layer: the mixture.
        tokens: ``(T, D)``.
        routing: of the tokens.
    """
    if layer.d_latent is not None:
        tokens = layer.latent_down(tokens)
    if layer.input_norm is not None:
        tokens = layer.input_norm(tokens)
    if layer.num_idle_experts:
        computed = routing.indices.masked_fill(routing.indices >= layer.num_experts, -1)
        routing = routing._replace(indices=computed)
    return operands_of(tokens, routing, layer.router.weights.apply_to == "input")


def from_experts(layer: Surrounded, outputs: Tensor, tokens: Tensor, routing: Routing) -> Tensor:
    """Bring the experts' outputs to full width, and add what identity experts return.

    Args:
        layer: the mixture.
        outputs: of the operands' rows, l wide.
        tokens: ``(T, D)``, as the layer reads them.
        routing: of the tokens.

    Returns:
        ``(T, D)``.
    """
    outputs = outputs_of(outputs, routing, layer.router.weights.apply_to == "input")
    if layer.d_latent is not None:
        outputs = layer.latent_up(outputs)
    if layer.num_identity_experts:
        slots = (layer.num_experts, layer.num_experts + layer.num_identity_experts)
        outputs = outputs + returned_tokens(tokens, routing, slots).to(outputs.dtype)
    return outputs


def shared_answer(
    layer: Surrounded,
    tokens: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    brute_force: bool,
) -> Tensor:
    """Return what the shared expert adds, ``(T, D)``; zero for padding.

    Args:
        layer: the mixture.
        tokens: ``(T, D)``.
        mask: ``(T,)`` bool, true at real tokens.
        weights: of the router, for each shared expert, ``(T, S)``; None: they count fully.
        brute_force: compute by the reference.
    """
    expert = layer.shared_expert
    if weights is not None:
        answer = weighed_shared(expert, tokens, weights, brute_force)
    else:
        answer = (expert.reference if brute_force else expert)(tokens).hidden
    if layer.shared_gate:
        answer = layer.shared_expert_gate(tokens).sigmoid() * answer
    return answer if mask is None else answer.masked_fill(~mask.unsqueeze(-1), 0.0)
