"""A dense block of which every token reads a part: selective computation of trained weights.

``g = act(W_gate (x ⊙ 1[a_x]))``, ``u = W_up (x ⊙ 1[a_u])``, ``h = g ⊙ u ⊙ 1[a_g]`` and
``y = W_down (h ⊙ 1[a_h])``, where the masks keep what is large. With thresholds they are
``a_x: |x| > t_x``, ``a_g: |g| > t_g``, ``a_u: |x| > t_u`` and ``a_h: |h| > t_h``, of which CATS
(Lee et al. 2024, arXiv:2404.08763), CHESS (arXiv:2409.01366), TEAL (arXiv:2408.14690) and WINA
(arXiv:2505.19427) use some; :mod:`moezoo.selection.thresholds` says which. The weights are those of
a dense block, which ``moezoo sparsify`` makes selective.

The first token of a document is computed dense: attention gathers there, its hidden values are
up to a thousand times those of others, and every later token depends on it.

Shapes: T tokens, D d_model, F hidden width.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moezoo.errors import check_int
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense_weights import Activation, DenseWeights
from moezoo.routing.deferred import statistics
from moezoo.routing.neuron_stats import neuron_stats
from moezoo.routing.stats import SlotLoad, neuron_load
from moezoo.selection import (
    Kept,
    Predictor,
    PredictorSelector,
    Selection,
    Selector,
    Thresholds,
    ThresholdSelector,
    kept,
)
from moezoo.selection.options import EVERYTHING
from moezoo.selection.selector import Matrix, added, both, dropped, or_dense, share
from moezoo_kernels import selective_mlp
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gate_value, up_value
from moezoo_kernels.linear import Linear, is_plain_linear
from moezoo_kernels.selective_mlp import Thresholds as KernelThresholds
from moezoo_kernels.selective_mlp.cpu import is_direct


class SelectiveFFN(DenseWeights[nn.Linear]):
    """A dense block that skips what small inputs, gates and hidden values would multiply.

    A call's ``stats``: ``tokens``; ``density_gate``, ``density_up`` and ``density_down``, the mean
    share of each matrix's products that tokens need; ``density``, the mean share of neurons whose
    hidden value is kept and not zero; ``usage``, the share of neurons that some token kept;
    ``unevenness``, the divergence of the neurons' summed magnitudes from uniform, in nats; and up
    to 4096 neurons, ``expert_counts`` (F,), how often each was kept. It has no losses.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width F; default 4 d_model, or 8/3 d_model rounded up to 16 when gated.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: a gated linear unit (three matrices) instead of an MLP (two).
        bias: whether the projections have biases.
        glu: bounds of the gated linear unit's factors, as of :class:`moezoo.DenseFFN`.
        selection: the rule by which a token reads a part, and its options.
        first_tokens: how many tokens at the start of a document read all; known where a call has
            ``positions``.
    """

    reads_positions: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        glu: GLUOptions = PLAIN_GLU,
        selection: Selection = EVERYTHING,
        first_tokens: int = 1,
    ) -> None:
        super().__init__(d_model, d_ff, activation, gated, bias, glu)
        selection.check(gated)
        self.selection = selection
        self.first_tokens = check_int("first_tokens", first_tokens, minimum=0)
        self._add_projections()
        self.selector = self._build_selector()
        self.reset_parameters()

    def _linear(self, inputs: int, outputs: int, reads_hidden: bool = False) -> nn.Linear:
        return Linear(inputs, outputs, bias=self.bias)

    def _build_selector(self) -> Selector:
        if isinstance(self.selection, Predictor):
            act, glu = self.activation, self.glu
            return PredictorSelector(self.d_model, self.d_ff, self.selection, act, glu)
        return ThresholdSelector(self.d_model, self.d_ff, self.gated, self.selection)

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw weights from N(0, 1/fan_in); the output's further / sqrt(2 num_layers)."""
        if self.gated:
            init_linear(self.gate_proj, self.d_model**-0.5)
        init_linear(self.up_proj, self.d_model**-0.5)
        init_linear(self.down_proj, output_std(self.d_ff, num_layers))
        self.selector.reset_parameters()

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Compute what is kept; a mask only keeps padding out of the statistics."""
        x_TD, _, mask_T = self._flatten(hidden, context)
        if not (brute_force or self.training) and self._reads_few(x_TD):
            deferred = statistics(self, self._stats_of, x_TD, mask_T, context)
            output = self._by_kernel(x_TD, context)
            return FeedForwardOutput(output.reshape(hidden.shape), {}, deferred)
        inner = self._brute_force_hidden if brute_force else self._hidden
        hidden_TF, rest_TD, masks = inner(x_TD, context)
        if brute_force:
            output = added(self._sum_of_neurons(hidden_TF), rest_TD)
            stats = self._stats(hidden_TF.detach(), mask_T, *masks)
            return FeedForwardOutput(output.reshape(hidden.shape), {}, stats)
        deferred = statistics(self, self._stats, hidden_TF, mask_T, *masks)
        output = added(self.down_proj(hidden_TF), rest_TD).reshape(hidden.shape)
        return FeedForwardOutput(output, {}, deferred)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Compute what is kept, without checks and statistics."""
        context = TokenContext(token_ids, router_input, mask, positions)
        x_TD = hidden.reshape(-1, self.d_model)
        if self._reads_few(x_TD):
            return self._by_kernel(x_TD, context).reshape(hidden.shape)
        hidden_TF, rest_TD, _ = self._hidden(x_TD, context)
        return added(self.down_proj(hidden_TF), rest_TD).reshape(hidden.shape)

    def _reads_few(self, x_TD: Tensor) -> bool:
        """Return whether the kernel reads less for these tokens than whole products would."""
        rule = self.selector
        return (
            type(rule) is ThresholdSelector
            and not rule.factors
            and all(is_plain_linear(part) for part in self.children() if part is not rule)
            and is_direct(x_TD, self.up_proj.weight)
        )

    def _by_kernel(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """Compute what is kept alone, without gradients, ``(T, D)``."""
        rule, gate = cast("ThresholdSelector", self.selector), None
        thresholds = KernelThresholds(input=rule.input, hidden=rule.hidden)
        if self.gated:
            gate = self.gate_proj
            thresholds = KernelThresholds(rule.input, rule.up_input, rule.gate, rule.hidden)
        return selective_mlp(
            x_TD,
            None if gate is None else gate.weight,
            self.up_proj.weight,
            self.down_proj.weight,
            thresholds,
            bias_gate=None if gate is None else gate.bias,
            bias_up=self.up_proj.bias,
            bias_down=self.down_proj.bias,
            activation=self.activation,
            glu=self.glu,
            dense=self._dense(context),
        )

    def _hidden(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None, Kept]:
        """Return hidden values ``(T, F)``, zero where not kept, the others' part, what was read."""
        rule, dense_T = self.selector, self._dense(context)
        neurons = or_dense(rule.keep_neurons(x_TD, context), dense_T)
        by_input = or_dense(rule.keep_input(x_TD), dense_T)
        by_gate = by_up_input = None
        chosen = neurons
        if self.gated:
            gate_TF = self._product(self.gate_proj, "gate", x_TD, by_input)
            gate_TF = gate_value(gate_TF, self.activation, self.glu)
            by_gate = chosen = both(chosen, or_dense(rule.keep_gate(gate_TF), dense_T))
            by_up_input = or_dense(rule.keep_up_input(x_TD), dense_T)
            up_TF = self._product(self.up_proj, "up", x_TD, by_up_input)
            hidden_TF = gate_TF * up_value(up_TF, self.glu)
        else:
            up_TF = self._product(self.up_proj, "up", x_TD, by_input)
            hidden_TF = ACTIVATIONS[self.activation](up_TF)
        hidden_TF = kept(hidden_TF, chosen)
        by_hidden = or_dense(rule.keep_hidden(hidden_TF), dense_T)
        others = dropped(hidden_TF, by_hidden) if rule.has_rest else None
        rest_TD = None if others is None else rule.rest("down", others)
        masks = Kept(by_input, by_gate, by_up_input, both(chosen, by_hidden), neurons)
        return kept(hidden_TF, by_hidden), rest_TD, masks

    def _product(
        self, linear: nn.Linear, matrix: Matrix, x_TD: Tensor, mask_TD: Tensor | None
    ) -> Tensor:
        """Multiply what is kept, and what is not by the rule's own factors, if it has some."""
        others = dropped(x_TD, mask_TD) if self.selector.has_rest else None
        product_TF = linear(kept(x_TD, mask_TD))
        return added(product_TF, None if others is None else self.selector.rest(matrix, others))

    def _dense(self, context: TokenContext) -> Tensor | None:
        """Mark the tokens that read all, ``(T,)``; None if no positions are known."""
        if context.positions is None or not self.first_tokens:
            return None
        return context.positions.reshape(-1) < self.first_tokens

    def _brute_force_hidden(
        self, x_TD: Tensor, context: TokenContext
    ) -> tuple[Tensor, Tensor | None, Kept]:
        """Return what :meth:`_hidden` does, neuron by neuron."""
        rule, every = self.selector, torch.ones(len(x_TD), 1, dtype=torch.bool, device=x_TD.device)
        positions = context.positions
        dense_T1 = ~every
        if positions is not None:
            dense_T1 = (positions < self.first_tokens).reshape(-1, 1)

        def mask(found: Tensor | None) -> Tensor:
            return every if found is None else found | dense_T1

        neurons = mask(rule.keep_neurons(x_TD, context)).expand(-1, self.d_ff)
        by_input = mask(rule.keep_input(x_TD)).expand_as(x_TD)
        if not self.gated:
            pre_TF = self._pre(self.up_proj, "up", x_TD, by_input)
            value_TF = ACTIVATIONS[self.activation](pre_TF)
            by_gate = by_up = None
            chosen = neurons
        else:
            by_up = mask(rule.keep_up_input(x_TD)).expand_as(x_TD)
            pre_TF = self._pre(self.gate_proj, "gate", x_TD, by_input)
            gate_TF = gate_value(pre_TF, self.activation, self.glu)
            by_gate = chosen = neurons & mask(rule.keep_gate(gate_TF))
            up_TF = self._pre(self.up_proj, "up", x_TD, by_up)
            value_TF = gate_TF * up_value(up_TF, self.glu)
        last = chosen & mask(rule.keep_hidden(value_TF))
        rest_TD = rule.rest("down", torch.where(chosen & ~last, value_TF, 0.0))
        masks = Kept(by_input, by_gate, by_up, last, neurons)
        return torch.where(last, value_TF, 0.0), rest_TD, masks

    def _pre(self, linear: nn.Linear, matrix: Matrix, x_TD: Tensor, mask_TD: Tensor) -> Tensor:
        """Return the pre-activations ``(T, F)``, neuron by neuron, of the inputs that are kept."""
        kept_TD = torch.where(mask_TD, x_TD, 0.0)
        neurons = [(kept_TD * row).sum(dim=-1) for row in linear.weight]
        product_TF = torch.stack(neurons, dim=-1)
        if linear.bias is not None:
            product_TF = product_TF + linear.bias
        return added(product_TF, self.selector.rest(matrix, torch.where(mask_TD, 0.0, x_TD)))

    def _stats_of(
        self, x_TD: Tensor, mask_T: Tensor | None, context: TokenContext
    ) -> dict[str, Tensor]:
        """Return the statistics of tokens that were computed without masks."""
        hidden_TF, _, masks = self._hidden(x_TD, context)
        return self._stats(hidden_TF, mask_T, *masks)

    def _stats(
        self,
        hidden_TF: Tensor,
        mask_T: Tensor | None,
        by_input: Tensor | None,
        by_gate: Tensor | None,
        by_up_input: Tensor | None,
        by_hidden: Tensor | None,
        neurons: Tensor | None,
    ) -> dict[str, Tensor]:
        load, active_T = neuron_load(hidden_TF, mask_T)
        products = {"down": share(by_hidden, active_T)}
        if self.gated:
            products["gate"] = share(by_input, active_T) * share(neurons, active_T)
            products["up"] = share(by_gate, active_T) * share(by_up_input, active_T)
        else:
            products["up"] = share(by_input, active_T) * share(neurons, active_T)
        densities = {f"density_{name}": each for name, each in products.items()}
        return neuron_stats(load, active_T, mask_T, densities)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count how often each neuron's hidden value is kept and not zero, and sum magnitudes."""
        x_TD, _, mask_T = self._flatten(hidden, context)
        return neuron_load(self._hidden(x_TD, context)[0], mask_T)[0]

    def cost(self) -> Cost:
        """Products as computed, which are dense: 4 d F FLOPs, 6 d F if gated, and the rule's own.

        A token's active parameters are those its products need on average, by the shares that were
        found in calibration; all, where there was none.
        """
        found = self.selector.calibrated()
        matrix = self.d_model * self.d_ff
        products = {"down": found.hidden, "up": found.input}
        if self.gated:
            products |= {"gate": found.input, "up": found.gate * found.up_input}
        total = sum(p.numel() for p in self.parameters())
        dense, own = matrix * len(products), self.selector.numbers()
        active = total - dense + round(matrix * sum(products.values()))
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=2 * (dense + own),
            bytes_per_token=(active + own) * self.up_proj.weight.element_size(),
        )


_INPUTS = 0.6745
"""The median of ``|x|`` where x is standard normal, as it is after a norm."""

register(
    Method(
        "cats",
        SelectiveFFN,
        Paper(
            "Lee et al.",
            2024,
            "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
            "2404.08763",
        ),
        {"selection": Thresholds(gate=0.25)},
    ),
    Method(
        "teal",
        SelectiveFFN,
        Paper(
            "Liu et al.",
            2024,
            "Training-Free Activation Sparsity in Large Language Models",
            "2408.14690",
        ),
        {"selection": Thresholds(input=_INPUTS, up_input=_INPUTS, hidden=0.14)},
    ),
)
