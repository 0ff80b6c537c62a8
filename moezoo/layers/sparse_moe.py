"""Sparse mixture of experts: each token is routed to a few of many feed-forward blocks.

``y = Σ_{e in chosen(x)} g_e(x) Expert_e(x) [+ Shared(x)]`` (Shazeer et al. 2017,
arXiv:1701.06538, eq. 1). How tokens and experts are matched, balanced and limited is set by three
groups of options; the zoo's entries (switch, gshard, mixtral, deepseek_v3, …) are settings of
them, each from its paper.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from moezoo.arguments import as_options
from moezoo.errors import InputError, check_choice, check_flag, check_int
from moezoo.experts import ExpertNormOptions, MLPExperts
from moezoo.experts.norms import InputNorm, OutputNorm
from moezoo.feed_forward import Cost, FeedForward, FeedForwardOutput, TokenContext
from moezoo.init import init_linear
from moezoo.layers.dense import Activation, DenseFFN, check_glu
from moezoo.layers.mixture_cost import cost_of
from moezoo.layers.mixture_options import check_idle, check_shared, width_of_experts
from moezoo.layers.mixture_surroundings import (
    from_experts,
    norms_of,
    shared_answer,
    to_experts,
)
from moezoo.routing import BalanceOptions, CapacityOptions, Router, RouterOptions, Routing
from moezoo.routing.options import check_top_k
from moezoo.routing.stats import SlotLoad, slot_load
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions
from moezoo_kernels.linear import Linear


def _sequences(hidden: Tensor) -> tuple[int, int] | None:
    """Return how many sequences of what length there are; None for tokens of no known sequence."""
    return (hidden.shape[0], hidden.shape[1]) if hidden.ndim == 3 else None


class SparseMoE(FeedForward):
    """A sparse mixture of MLP or GLU experts; dropless unless a capacity is given.

    A call's ``losses``: those of ``load_balancing``, ``router_z``, ``importance``, ``load`` and
    ``sequence_balance`` whose coefficient is not zero. Its ``stats``: ``expert_counts`` (E,) before
    capacity, ``tokens``, ``usage``, the share of experts chosen, ``unevenness``, the divergence of
    their weights from uniform in nats, ``router_entropy`` in nats, ``dropped`` assignments;
    with thresholds ``without_expert``, the share of tokens that no expert takes; and in training
    ``margins``, a histogram, where :meth:`observe` reads one, and ``rounded_up`` and
    ``rounded_down``, the assignments that ``router.rounding`` added and dropped, as shares.

    Args:
        d_model: width of the residual stream.
        num_experts: number of routed experts.
        top_k: experts per token (on average, where experts take tokens).
        d_expert: hidden width of one expert; default: the dense block's width divided by the
            number of experts that a token runs, rounded up to a multiple of 16, so that a token
            costs what the dense block costs (more by the two maps, with ``d_latent``).
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: gated linear units instead of MLPs.
        bias: whether the experts' projections have biases.
        d_latent: width that the routed experts read and write, between two linear maps without
            biases that they share (Nemotron-H); router and shared expert stay at ``d_model``.
            None: ``d_model``, and no maps.
        interleaved: rows of the experts' gate and linear half lie in turn in ``gate_up_proj`` and
            its bias, as GPT-OSS stores them, instead of all gates first.
        expert_norms: norms before and after the routed experts (Muse Spark).
        num_identity_experts: experts I that return the token itself and cost nothing, beside the
            ``num_experts`` that compute (LongCat-Flash, arXiv:2509.01322); slots E to E + I - 1 of
            the router, the statistics and the losses. Without capacity, in token choice.
        num_skip_experts: experts that return zero, and so skip the layer (ZAYA, which has one), in
            the slots after those; likewise.
        num_shared_experts: experts that run on every token (arXiv:2401.06066), as one block.
        d_shared: hidden width of that block; default num_shared_experts * d_expert.
        shared_bias: whether the shared expert's projections have biases; default: as the experts'
            (Ernie 4.5 has them there alone).
        shared_gate: weight the shared expert by a learned sigmoid gate (Qwen2-MoE).
        glu: bounds of the gated linear units' factors, in experts and shared expert.
        shared_glu: those of the shared expert, where they differ (Step-3.7; none in Hunyuan 4).
        router: how tokens and experts find each other.
        balance: coefficients of the auxiliary losses.
        capacity: a limit on the tokens per expert; none by default (dropless).
    """

    reads_router_input: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        d_expert: int | None = None,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        d_latent: int | None = None,
        interleaved: bool = False,
        expert_norms: ExpertNormOptions = ExpertNormOptions(),  # noqa: B008 - frozen
        num_identity_experts: int = 0,
        num_skip_experts: int = 0,
        num_shared_experts: int = 0,
        d_shared: int | None = None,
        shared_bias: bool | None = None,
        shared_gate: bool = False,
        glu: GLUOptions = PLAIN_GLU,
        shared_glu: GLUOptions | None = None,
        router: RouterOptions = RouterOptions(),  # noqa: B008 - frozen
        balance: BalanceOptions = BalanceOptions(),  # noqa: B008 - frozen
        capacity: CapacityOptions | None = None,
    ) -> None:
        super().__init__(d_model)
        router = as_options("router", router, RouterOptions)
        balance = as_options("balance", balance, BalanceOptions)
        self.num_experts = check_int("num_experts", num_experts)
        self.num_identity_experts, self.num_skip_experts = num_identity_experts, num_skip_experts
        self.num_idle_experts = check_idle(num_identity_experts, num_skip_experts, capacity)
        slots = num_experts + self.num_idle_experts
        self.top_k = check_top_k(top_k, slots)
        router.check(slots, top_k, self.num_idle_experts)
        self.router = router
        self.num_shared_experts = check_int("num_shared_experts", num_shared_experts, minimum=0)
        self.d_latent = None if d_latent is None else check_int("d_latent", d_latent)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.interleaved = check_flag("interleaved", interleaved)
        if interleaved and not gated:
            raise InputError("interleaved: there is no gate to lie in turn with; set gated to true")
        self.d_expert = width_of_experts(self) if d_expert is None else d_expert
        check_int("d_expert", self.d_expert)
        self.glu = check_glu(glu, activation, gated)
        self.expert_norms = as_options("expert_norms", expert_norms, ExpertNormOptions)
        self.expert_norms.check(weigh_inputs=router.weights.apply_to == "input")
        self.d_shared = num_shared_experts * self.d_expert if d_shared is None else d_shared
        self.shared_gate = shared_gate
        self.shared_bias = shared_bias
        self.shared_glu = shared_glu
        if shared_glu is not None:
            self.shared_glu = as_options("shared_glu", shared_glu, GLUOptions)
        check_shared(self)
        balance.check(router)
        self.balance = balance
        if capacity is not None:
            capacity = as_options("capacity", capacity, CapacityOptions)
            capacity.check(router, top_k)
        self.capacity = capacity

        self.gate = Router(
            d_model,
            slots,
            top_k,
            options=router,
            balance=balance,
            capacity=capacity,
            num_shared=num_shared_experts,
            num_idle=self.num_idle_experts,
        )
        width = self.d_latent or d_model
        self.experts = MLPExperts(
            width,
            self.d_expert,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            glu=self.glu,
            interleaved=interleaved,
        )
        norms = self.expert_norms
        self.input_norm = InputNorm(width, norms.input_eps) if norms.input else None
        self.output_norm = OutputNorm(width, norms.output_eps) if norms.output else None
        if d_latent is not None:
            self.latent_down = Linear(d_model, d_latent, bias=False)
            self.latent_up = Linear(d_latent, d_model, bias=False)
            self._reset_latent()
        if self.d_shared:
            self.shared_expert = DenseFFN(
                d_model,
                self.d_shared,
                activation=activation,
                gated=gated,
                bias=bias if shared_bias is None else shared_bias,
                glu=self.glu if self.shared_glu is None else self.shared_glu,
            )
        if shared_gate:
            self.shared_expert_gate = Linear(d_model, 1, bias=False)
            self._reset_shared_gate()

    @property
    def reads_router_state(self) -> bool:
        """Whether the router adds the state of the layer before (``router.logits.carry``)."""
        return self.router.logits.carry

    @property
    def router_state_width(self) -> int:
        """The width of the state that the router hands on, that of its MLP."""
        return self.router.logits.mlp

    @property
    def causal(self) -> bool:
        """False in expert choice: whether a token is taken depends on the tokens after it.

        False too with ``router.rounding``, but in training alone, as a new layer is.

        True with a limit on capacity, though with ``top_k > 1`` the first choices of later tokens
        take room from a token's second choice, and how much room there is follows from the number
        of tokens (arXiv:2006.16668, algorithm 1).
        """
        return self.router.choice != "expert" and not (self.training and self.router.rounding)

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise router, experts and shared expert; outputs scale with 1/sqrt(num_layers)."""
        self.gate.reset_parameters()
        self.experts.reset_parameters(num_layers)
        for norm in norms_of(self):
            norm.reset_parameters()
        if self.d_latent is not None:
            self._reset_latent()
        if self.d_shared:
            self.shared_expert.reset_parameters(num_layers)
        if self.shared_gate:
            self._reset_shared_gate()

    def _reset_latent(self) -> None:
        """Draw both maps from N(0, 1/fan_in); the experts' outputs are scaled already."""
        for linear in (self.latent_down, self.latent_up):
            init_linear(linear, linear.in_features**-0.5)

    def _reset_shared_gate(self) -> None:
        init_linear(self.shared_expert_gate, self.d_model**-0.5)

    def adjust(self, routing: Routing, hidden: Tensor, context: TokenContext) -> Routing:
        """Return the routing by which the experts run; here, that of the router as it is.

        For subclasses that change which experts a token is routed to, or with what weights, to
        override; nothing else needs to be. Every path calls it between router and experts:
        :meth:`forward`, :meth:`reference`, :meth:`infer`, :meth:`route` and :meth:`slot_load`,
        and with expert parallelism each rank does so before tokens are dispatched. Gradients flow
        through the weights. Losses and statistics are the router's; put others in their place if
        they are to follow.

        Args:
            routing: of T tokens: indices, -1 for none, and weights, both ``(T, K)``, K free to
                change; ``max_assignments`` must stay an upper bound on the indices that are not
                -1. Without losses and statistics in :meth:`infer`.
            hidden: ``(T, d_model)``, what the experts read.
            context: what else the call was given, in its shape: ``token_ids``, ``router_input``
                and ``mask``. Padding has the index -1 already.
        """
        return routing

    def route(
        self,
        hidden: Tensor,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        limited: bool = True,
        router_state: Tensor | None = None,
    ) -> Routing:
        """Return the routing without running the experts: indices, weights, losses, statistics.

        Args:
            hidden: ``(..., d_model)``.
            router_input: ``(..., d_model)``, read in place of ``hidden``.
            mask: ``(...)`` bool, true at real tokens.
            token_ids: ``(...)`` int64, for :meth:`adjust`.
            limited: whether the limit on capacity applies, if there is one.
            router_state: ``(..., R)``, what the layer before handed on.
        """
        given = TokenContext(token_ids, router_input, mask, router_state=router_state)
        return self.routed(hidden, given, limited)[1]

    def routed(
        self, hidden: Tensor, context: TokenContext, limited: bool
    ) -> tuple[Tensor, Routing, Tensor | None]:
        """Return what the experts read, ``(T, D)``, the routing, and the mask ``(T,)``."""
        tokens, router_TD, flat_mask = self._flatten(hidden, context)
        factors = self.gate.jitter_of(router_TD) if self.router.jitter_experts else None
        if factors is not None:
            tokens, router_TD = (tokens * factors).to(tokens.dtype), router_TD * factors
        state = context.router_state
        state_TR = None if state is None else state.reshape(-1, state.shape[-1])
        routing = self.gate(router_TD, flat_mask, _sequences(hidden), limited, state_TR)
        return tokens, self.adjust(routing, tokens, context), flat_mask

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the experts' choices and weights, before capacity."""
        _, routing, _ = self.routed(hidden, context, limited=False)
        return slot_load(routing.indices, routing.weights.abs(), self.gate.num_experts)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Sum up each token's weighted experts; by brute force, run all of them on all tokens."""
        tokens, routing, flat_mask = self.routed(hidden, context, limited=True)
        chosen = to_experts(self, tokens, routing)
        dispatched = None if brute_force else self.experts.dispatch(*chosen)
        # The shared expert runs while tokens travel to experts on other ranks.
        shared = None
        if self.d_shared:
            shared = shared_answer(self, tokens, flat_mask, routing.shared_weights, brute_force)
        if brute_force:
            output = self.experts.reference(*chosen, after=self.output_norm)
        else:
            run = (routing.max_assignments, True, dispatched, self.output_norm)
            output = self.experts(*chosen, *run)
        output = from_experts(self, output, tokens, routing)
        if shared is not None:
            output = output + shared
        output, state = output.reshape(hidden.shape), routing.state
        if state is not None:
            state = state.reshape(*hidden.shape[:-1], state.shape[-1])
        return FeedForwardOutput(output, routing.losses, routing.stats, state)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Route each token to its experts and sum their weighted outputs, and no more.

        A router that carries a state begins with zeros here, and none is handed on: call the layer.
        """
        if self.training:
            called = self(hidden, token_ids=token_ids, router_input=router_input, mask=mask)
            return called.hidden
        tokens = hidden.reshape(-1, self.d_model)
        flat_mask = None if mask is None else mask.flatten()
        router_TD = tokens if router_input is None else router_input.reshape(-1, self.d_model)
        context = TokenContext(token_ids, router_input, mask)
        routing = self.gate.select(router_TD, flat_mask, _sequences(hidden))
        routing = self.adjust(routing, tokens, context)
        chosen = to_experts(self, tokens, routing)
        output = self.experts.infer(*chosen, routing.max_assignments, after=self.output_norm)
        output = from_experts(self, output, tokens, routing)
        if self.d_shared:
            shared = shared_answer(
                self, tokens, flat_mask, routing.shared_weights, brute_force=False
            )
            output = output + shared
        return output.reshape(hidden.shape)

    def cost(self) -> Cost:
        """Router, top_k experts and the shared expert: 2 d E + k (4 | 6) d f FLOPs and so on.

        With ``d_latent`` l the experts' d is l, and their shared maps take 4 d l. With I experts
        that compute nothing, k E / (E + I) stands for k, or ``router.expected_experts``: the mean
        to which the selection bias steers; what a text takes follows from its choices. Where
        experts take or round: k.
        """
        return cost_of(self)
