"""CMoE's layer: what a carved feed-forward block is, and how it is fine-tuned.

``y = Shared(x) + Σ_{e in topK(s' + b)} g_e Expert_e(x)`` with ``g_e = 1 + s'_e u_e`` and
``s' = softmax(s(x))`` (arXiv:2502.04416, section 4.4). The scale u is trained and begins at zero,
so that a carved block begins with its experts counting fully, and the balance bias b follows the
load. Shared part and experts are the dense block's own neurons: :func:`moezoo.convert.carve_block`
says which, and :func:`moezoo.convert.carved_layer` copies them here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.experts import MLPExperts
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    ParameterGroup,
    TokenContext,
    register,
    set_apart,
)
from moezoo.layers.dense import Activation, DenseFFN, default_width
from moezoo.routing.neuron import NeuronRouter
from moezoo.routing.options import check_top_k
from moezoo.routing.router import Routing
from moezoo.routing.stats import SlotLoad, slot_load
from moezoo_kernels.activations import ACTIVATIONS


class CarvedMoE(FeedForward):
    """Shared and routed parts of a feed-forward block, in CMoE's notation SxAyEz.

    A call's ``stats`` are those of :class:`moezoo.SparseMoE`; an expert's weight there is s'.

    Args:
        d_model: width of the residual stream.
        num_experts: routed experts, z - x.
        top_k: routed experts per token, y.
        d_expert: neurons of one part; default: those of the dense block divided by z, rounded up
            to a multiple of 16.
        num_shared_experts: parts that run on every token, x, as one block.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: gated linear units instead of MLPs.
        bias: whether hidden neurons have biases.
        output_bias: whether the output has a bias, once for all parts.
        router: ``neuron``: an expert's score is the activation of a neuron of its own (eq. 8).
            ``linear``: it is linear in x, with an intercept. ``shared``: linear in x and in the
            absolute activations of the shared part's neurons, which are computed anyway.
        signed: leave the sign of the neurons' activations, as in eq. 8; the authors' code takes
            absolute values.
        bias_update_rate: γ, how far the balance bias moves per optimizer step.
        u_lr_multiplier: learning rate of u, as a multiple of the run's; the paper has 1e-3 beside
            5.95e-5 for LoRA, a factor of 17.
        router_lr_multiplier: likewise of the router. Its gradient comes through u alone, and Adam
            takes full steps however small that is: at the run's rate the choices wander.
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 5,
        top_k: int = 3,
        d_expert: int | None = None,
        num_shared_experts: int = 3,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        output_bias: bool = False,
        router: Literal["neuron", "linear", "shared"] = "neuron",
        signed: bool = False,
        bias_update_rate: float = 1e-3,
        u_lr_multiplier: float = 1.0,
        router_lr_multiplier: float = 0.01,
    ) -> None:
        super().__init__(d_model)
        self.num_experts = check_int("num_experts", num_experts)
        self.top_k = check_top_k(top_k, num_experts)
        self.num_shared_experts = check_int("num_shared_experts", num_shared_experts, minimum=0)
        if d_expert is None:
            parts = num_experts + num_shared_experts
            d_expert = -(-default_width(d_model, gated) // (16 * parts)) * 16
        self.d_expert = check_int("d_expert", d_expert)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.output_bias = output_bias
        self.router = check_choice("router", router, ("neuron", "linear", "shared"))
        if router == "shared" and not num_shared_experts:
            raise InputError(
                "router: shared reads neurons of the shared part, and there is none; give "
                "num_shared_experts, or router linear"
            )
        self.signed = signed
        self.bias_update_rate = check_number("bias_update_rate", bias_update_rate)
        self.u_lr_multiplier = check_number("u_lr_multiplier", u_lr_multiplier)
        self.router_lr_multiplier = check_number("router_lr_multiplier", router_lr_multiplier)

        read = d_model + (num_shared_experts * self.d_expert if router == "shared" else 0)
        self.gate = NeuronRouter(
            read,
            num_experts,
            top_k,
            score="neuron" if router == "neuron" else "linear",
            activation=activation,
            gated=gated,
            bias=bias,
            signed=signed,
            bias_update_rate=bias_update_rate,
        )
        self.u = nn.Parameter(torch.zeros(num_experts))
        self.experts = MLPExperts(
            d_model, self.d_expert, num_experts, activation=activation, gated=gated, bias=bias
        )
        self.experts.down_bias = None  # the dense block had one, which is not any part's
        if num_shared_experts:
            d_shared = num_shared_experts * self.d_expert
            self.shared_expert = DenseFFN(
                d_model, d_shared, activation=activation, gated=gated, bias=bias
            )
            self.shared_expert.down_proj.register_parameter("bias", None)
        self.b_out: nn.Parameter | None = None
        if output_bias:
            self.b_out = nn.Parameter(torch.zeros(d_model))

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw the parts as those of a dense block; zero u, b and the output bias."""
        self.gate.reset_parameters()
        self.experts.reset_parameters(num_layers)
        if self.num_shared_experts:
            self.shared_expert.reset_parameters(num_layers)
        nn.init.zeros_(self.u)
        if self.b_out is not None:
            nn.init.zeros_(self.b_out)

    def route(
        self, hidden: Tensor, router_input: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """Return the routing without running the experts: indices, scores s', statistics."""
        _, router_TD, flat_mask = self._flatten(hidden, TokenContext(None, router_input, mask))
        return self.gate(self._seen(router_TD)[0], flat_mask)

    def _seen(self, router_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the router reads; and the shared neurons' activations, if it reads them."""
        if self.router != "shared":
            return router_TD, None
        inner_TF = self.shared_expert.inner(router_TD)
        return torch.cat([router_TD, inner_TF.abs()], dim=1), inner_TF

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Run the shared part and each token's experts; by brute force, all on all tokens."""
        tokens, router_TD, flat_mask = self._flatten(hidden, context)
        seen_TP, inner_TF = self._seen(router_TD)
        routing = self.gate(seen_TP, flat_mask)
        chosen = (tokens, routing.indices, self._gates(routing.indices, routing.weights))
        dispatched = None if brute_force else self.experts.dispatch(*chosen)
        # The shared part runs while tokens travel to experts on other ranks.
        of_tokens = None if brute_force or router_TD is not tokens else inner_TF
        always = self._always(tokens, brute_force, of_tokens)
        if brute_force:
            output = self.experts.reference(*chosen)
        else:
            output = self.experts(*chosen, routing.max_assignments, dispatched=dispatched)
        output = _added(output, always, flat_mask)
        return FeedForwardOutput(output.reshape(hidden.shape), routing.losses, routing.stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Sum the shared part and each token's experts, and no more."""
        tokens = hidden.reshape(-1, self.d_model)
        flat_mask = None if mask is None else mask.flatten()
        router_TD = tokens if router_input is None else router_input.reshape(-1, self.d_model)
        seen_TP, inner_TF = self._seen(router_TD)
        routing = self.gate.select(seen_TP, flat_mask)
        gates = self._gates(routing.indices, routing.weights)
        output = self.experts.infer(tokens, routing.indices, gates, routing.max_assignments)
        always = self._always(tokens, False, inner_TF if router_input is None else None)
        output = _added(output, always, flat_mask)
        return output.reshape(hidden.shape)

    def _gates(self, indices_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """Return ``g = 1 + s' u`` of the chosen experts, 0 where there is none."""
        # An embedding's gradient is summed in a fixed order, that of indexing is not.
        u_TK = F.embedding(indices_TK.clamp(min=0), self.u.unsqueeze(-1)).squeeze(-1)
        gates_TK = 1.0 + scores_TK * u_TK.to(scores_TK.dtype)
        return gates_TK.masked_fill(indices_TK < 0, 0.0)

    def _always(
        self, tokens: Tensor, brute_force: bool, inner_TF: Tensor | None = None
    ) -> Tensor | None:
        """Compute what every token gets: the shared part, the output bias.

        Args:
            tokens: ``(T, D)``.
            brute_force: whether by the shared part's reference.
            inner_TF: its neurons' activations at these tokens, if they are known.
        """
        answer: Tensor | None = None
        if inner_TF is not None:
            answer = self.shared_expert.down_proj(inner_TF)
        elif self.num_shared_experts:
            expert = self.shared_expert
            answer = (expert.reference if brute_force else expert)(tokens).hidden
        if self.b_out is None:
            return answer
        if answer is None:
            return self.b_out.expand(len(tokens), -1)
        return answer + self.b_out.to(answer.dtype)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the routed experts' choices and scores s'."""
        routing = self.route(hidden, context.router_input, context.mask)
        return slot_load(routing.indices, routing.weights, self.num_experts)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return u and the router learning rates of their own, and no weight decay."""
        rates = {"u": self.u_lr_multiplier, "router": self.router_lr_multiplier}
        members = {"u": [self.u], "router": list(self.gate.parameters())}
        apart = [
            ParameterGroup(
                name,
                [p for p in members[name] if p.requires_grad],
                lr_multiplier=rates[name],
                weight_decay=False,
            )
            for name in rates
        ]
        return set_apart(super().parameter_groups(), apart)

    def cost(self) -> Cost:
        """Router (2 | 4) d E, shared part and top_k experts (4 | 6) d f FLOPs each."""
        per_expert = self.experts.parameters_per_expert()
        total = sum(p.numel() for p in self.parameters())
        active = total - (self.num_experts - self.top_k) * per_expert
        flops = self.gate.flops_per_token() + self.top_k * self.experts.flops_per_assignment()
        if self.num_shared_experts:
            flops += self.shared_expert.cost().flops_per_token
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=flops,
            bytes_per_token=active * self.experts.down_proj.element_size(),
        )


def _added(output: Tensor, always: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the output of the routed experts plus the shared part's at real tokens, if any."""
    if always is None:
        return output
    if mask is not None:
        always = always.masked_fill(~mask.unsqueeze(-1), 0.0)
    return output + always.to(output.dtype)


register(
    Method(
        "cmoe",
        CarvedMoE,
        Paper(
            "Pei et al.",
            2025,
            "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis",
            "2502.04416",
        ),
    )
)
