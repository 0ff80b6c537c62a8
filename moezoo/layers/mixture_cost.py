"""The cost of a sparse mixture, by formula."""

from __future__ import annotations

from math import ceil
from typing import Any

from moezoo.cost import Cost
from moezoo.layers.mixture_options import experts_per_token
from moezoo.layers.mixture_surroundings import norms_of


def cost_of(layer: Any) -> Cost:
    """Return the cost of a :class:`moezoo.SparseMoE`; see its :meth:`~moezoo.SparseMoE.cost`."""
    routing = sum(p.numel() for p in layer.gate.parameters())
    always_parameters, always_flops = routing, layer.gate.flops_per_token()
    always_parameters += sum(norm.weight.numel() for norm in norms_of(layer))
    if layer.d_shared:
        shared = layer.shared_expert.cost()
        always_parameters += shared.total_parameters
        always_flops += shared.flops_per_token
    if layer.shared_gate:
        always_parameters += layer.d_model
        always_flops += 2 * layer.d_model
    if layer.d_latent is not None:
        always_parameters += 2 * layer.d_model * layer.d_latent
        always_flops += 4 * layer.d_model * layer.d_latent
    per_expert, computing = layer.experts.parameters_per_expert(), experts_per_token(layer)
    active = always_parameters + ceil(computing * per_expert)
    return Cost(
        total_parameters=always_parameters + layer.num_experts * per_expert,
        active_parameters=active,
        flops_per_token=always_flops + ceil(computing * layer.experts.flops_per_assignment()),
        bytes_per_token=active * layer.experts.down_proj.element_size(),
    )
