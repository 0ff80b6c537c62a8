"""What the options of a sparse mixture ask of each other."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from moezoo.errors import InputError, check_int
from moezoo.layers.dense import check_glu, default_width
from moezoo.routing import RouterOptions
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions


class Mixture(Protocol):
    """The arguments of a :class:`moezoo.SparseMoE` that are read here."""

    d_model: int
    num_experts: int
    top_k: int
    d_expert: int
    d_latent: int | None
    num_idle_experts: int
    num_shared_experts: int
    d_shared: int
    shared_gate: bool
    shared_bias: bool | None
    shared_glu: GLUOptions | None
    activation: str
    gated: bool
    bias: bool
    router: RouterOptions


def experts_per_token(layer: Mixture) -> Fraction:
    """Return how many routed experts compute for a token on average."""
    slots = layer.num_experts + layer.num_idle_experts
    return layer.router.computing(slots, layer.top_k, layer.num_idle_experts)


def width_of_experts(layer: Mixture) -> int:
    """Return the hidden width at which a token costs what the dense block costs.

    Rounded up to a multiple of 16.
    """
    dense = default_width(layer.d_model, layer.gated) * layer.d_model
    running = experts_per_token(layer) + layer.num_shared_experts
    return -(-dense // (16 * running * (layer.d_latent or layer.d_model))) * 16


def check_idle(identity: int, skip: int, capacity: object | None) -> int:
    """Return how many experts compute nothing.

    Raises:
        InputError: either is no count, or experts have a limited capacity.
    """
    counts = {"num_identity_experts": identity, "num_skip_experts": skip}
    for name, number in counts.items():
        if check_int(name, number, minimum=0) and capacity is not None:
            raise InputError(f"capacity: is not defined with {name}; set it to null")
    return identity + skip


def check_shared(layer: Mixture) -> None:
    """Check the options of shared experts.

    Raises:
        InputError: one has no effect, or contradicts another.
    """
    check_int("d_shared", layer.d_shared, minimum=0)
    if bool(layer.d_shared) != bool(layer.num_shared_experts):
        raise InputError("d_shared: goes with num_shared_experts; set both or neither")
    if layer.shared_glu is not None:
        check_glu(layer.shared_glu, layer.activation, layer.gated, "shared_glu")
    for option, is_set, purpose in (
        ("shared_glu", layer.shared_glu not in (None, PLAIN_GLU), "to bound"),
        ("shared_gate", layer.shared_gate, "to gate"),
        ("shared_bias", layer.shared_bias is not None, "to have biases"),
    ):
        if is_set and not layer.num_shared_experts:
            raise InputError(
                f"{option}: there is no shared expert {purpose}; set num_shared_experts"
            )
    if layer.router.weights.with_shared:
        _check_weighed(layer)


def _check_weighed(layer: Mixture) -> None:
    """Raise :class:`InputError` unless each shared expert can have a weight of its own."""
    if not layer.num_shared_experts:
        raise InputError(
            "router.weights.with_shared: there is no shared expert; set num_shared_experts"
        )
    if layer.shared_gate:
        raise InputError("shared_gate: the router weighs the shared experts; set it to false")
    if layer.bias if layer.shared_bias is None else layer.shared_bias:
        raise InputError(
            "bias: shared experts have one output bias, which no weight of theirs belongs to; set "
            "it or shared_bias to false, or router.weights.with_shared"
        )
    if layer.d_shared % layer.num_shared_experts:
        raise InputError(
            f"d_shared: {layer.d_shared} neurons are not {layer.num_shared_experts} experts of one "
            "width; give a multiple"
        )
