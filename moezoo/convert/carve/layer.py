"""A plan carried out: the layer that is fine-tuned."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moezoo.convert.plan import Expert, LayerPlan, Projection
from moezoo.errors import InputError
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import Activation


@torch.no_grad()
def carved_layer(
    plan: LayerPlan,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation = "silu",
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> CarvedMoE:
    """Build the trainable layer that computes what a carved plan does.

    Args:
        plan: from :func:`~moezoo.convert.carve.carve_block`.
        gate: ``(F, D)`` of the dense block; None for a plain MLP.
        up: ``(F, D)``.
        down: ``(D, F)``.
        activation: the block's, by name.
        bias_in: ``(F,)``.
        bias_out: ``(D,)``.

    Returns:
        The layer, in ``up``'s dtype, with u and b zero.

    Raises:
        InputError: the plan's experts do not count fully, or its shared part is no whole number
            of experts.
    """
    if plan.weighting != "unit" or plan.d_shared % plan.d_expert:
        raise InputError(
            "plan: CarvedMoE holds experts that count fully and a shared part of whole experts; "
            "use SparseMoE for others"
        )
    offset = bias_out if plan.bias is None else plan.bias
    linear: Literal["linear", "shared"] = "shared" if plan.reads_shared else "linear"
    layer = CarvedMoE(
        up.shape[1],
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        d_expert=plan.d_expert,
        num_shared_experts=plan.d_shared // plan.d_expert,
        activation=activation,
        gated=gate is not None,
        bias=bias_in is not None,
        output_bias=offset is not None,
        router=linear if plan.router_neurons is None else "neuron",
        signed=plan.signed,
    ).to(up.dtype)
    weights = {"up": up, "down": down if plan.down is None else plan.down.to(down.dtype)}
    if gate is not None:
        weights["gate"] = gate
    inner: list[Projection] = ["up"] if gate is None else ["gate", "up"]

    def rows(expert: Expert) -> Tensor:
        return torch.cat([expert.cut(name, weights[name]) for name in inner])

    layer.experts.gate_up_proj.copy_(torch.stack([rows(e) for e in plan.experts]))
    layer.experts.down_proj.copy_(
        torch.stack([e.cut("down", weights["down"]) for e in plan.experts])
    )
    if plan.shared is not None:
        for name in (*inner, "down"):
            getattr(layer.shared_expert, f"{name}_proj").weight.copy_(
                plan.shared.cut(name, weights[name])
            )
    if bias_in is not None:
        assert layer.experts.gate_up_bias is not None
        layer.experts.gate_up_bias.copy_(torch.stack([e.cut_bias(bias_in) for e in plan.experts]))
        if plan.shared is not None:
            shared_bias = layer.shared_expert.up_proj.bias
            assert shared_bias is not None
            shared_bias.copy_(plan.shared.cut_bias(bias_in))
    if layer.b_out is not None and offset is not None:
        layer.b_out.copy_(offset)
    layer.gate.weight.copy_(plan.router)
    if layer.gate.bias is not None and plan.router_bias is not None:
        layer.gate.bias.copy_(plan.router_bias)
    if layer.gate.up_weight is not None and plan.router_up is not None:
        layer.gate.up_weight.copy_(plan.router_up)
    return layer
