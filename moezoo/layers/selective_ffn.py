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

from typing import ClassVar

import torch
from torch import Tensor, nn

from moezoo.errors import check_choice, check_int
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    register,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense import Activation, check_glu, default_width
from moezoo.routing.deferred import statistics
from moezoo.routing.losses import masked_mean
from moezoo.routing.stats import MOST_COUNTS, SlotLoad, kl_to_uniform, neuron_load, usage
from moezoo.selection import Kept, Selection, Selector, Thresholds, ThresholdSelector, kept
from moezoo.selection.selector import both, or_dense, share
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gate_value, up_value


class SelectiveFFN(FeedForward):
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
        selection: Selection = Thresholds(),
        first_tokens: int = 1,
    ) -> None:
        super().__init__(d_model)
        self.d_ff = default_width(d_model, gated) if d_ff is None else check_int("d_ff", d_ff)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.glu = check_glu(glu, activation, gated)
        selection.check(gated)
        self.selection = selection
        self.first_tokens = check_int("first_tokens", first_tokens, minimum=0)
        if gated:
            self.gate_proj = nn.Linear(d_model, self.d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, self.d_ff, bias=bias)
        self.down_proj = nn.Linear(self.d_ff, d_model, bias=bias)
        self.selector: Selector = ThresholdSelector(d_model, self.d_ff, gated, selection)
        self.reset_parameters()

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
        inner = self._brute_force_hidden if brute_force else self._hidden
        hidden_TF, masks = inner(x_TD, context)
        if brute_force:
            output = self._neuron_by_neuron(hidden_TF)
            stats = self._stats(hidden_TF.detach(), mask_T, *masks)
            return FeedForwardOutput(output.reshape(hidden.shape), {}, stats)
        deferred = statistics(self, self._stats, hidden_TF, mask_T, *masks)
        output = self.down_proj(hidden_TF).reshape(hidden.shape)
        return FeedForwardOutput(output, {}, deferred)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Compute what is kept, without checks and statistics."""
        context = TokenContext(token_ids, router_input, mask, positions)
        hidden_TF, _ = self._hidden(hidden.reshape(-1, self.d_model), context)
        output: Tensor = self.down_proj(hidden_TF)
        return output.reshape(hidden.shape)

    def _hidden(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, Kept]:
        """Return hidden values ``(T, F)``, zero where they are not kept, and what was read."""
        rule, dense_T = self.selector, self._dense(context)
        chosen = rule.keep_neurons(x_TD, context)
        by_input = or_dense(rule.keep_input(x_TD), dense_T)
        by_gate = by_up_input = None
        if self.gated:
            gate_TF = self.gate_proj(kept(x_TD, by_input))
            gate_TF = gate_value(gate_TF, self.activation, self.glu)
            chosen = both(chosen, rule.keep_gate(gate_TF))
            by_gate = chosen = or_dense(chosen, dense_T)
            by_up_input = or_dense(rule.keep_up_input(x_TD), dense_T)
            up_TF = up_value(self.up_proj(kept(x_TD, by_up_input)), self.glu)
            hidden_TF = gate_TF * up_TF
        else:
            chosen = or_dense(chosen, dense_T)
            hidden_TF = ACTIVATIONS[self.activation](self.up_proj(kept(x_TD, by_input)))
        by_hidden = both(chosen, or_dense(rule.keep_hidden(hidden_TF), dense_T))
        return kept(hidden_TF, by_hidden), Kept(by_input, by_gate, by_up_input, by_hidden)

    def _dense(self, context: TokenContext) -> Tensor | None:
        """Mark the tokens that read all, ``(T,)``; None if no positions are known."""
        if context.positions is None or not self.first_tokens:
            return None
        return context.positions.reshape(-1) < self.first_tokens

    def _brute_force_hidden(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, Kept]:
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
            pre = [self._pre(self.up_proj, x_TD, by_input, i) for i in range(self.d_ff)]
            value_TF = ACTIVATIONS[self.activation](torch.stack(pre, dim=-1))
            neurons = neurons & mask(rule.keep_hidden(value_TF))
            return torch.where(neurons, value_TF, 0.0), Kept(by_input, None, None, neurons)
        by_up = mask(rule.keep_up_input(x_TD)).expand_as(x_TD)
        pre = [self._pre(self.gate_proj, x_TD, by_input, i) for i in range(self.d_ff)]
        gate_TF = gate_value(torch.stack(pre, dim=-1), self.activation, self.glu)
        by_gate = neurons & mask(rule.keep_gate(gate_TF))
        up = [self._pre(self.up_proj, x_TD, by_up, i) for i in range(self.d_ff)]
        value_TF = gate_TF * up_value(torch.stack(up, dim=-1), self.glu)
        last = by_gate & mask(rule.keep_hidden(value_TF))
        return torch.where(last, value_TF, 0.0), Kept(by_input, by_gate, by_up, last)

    def _pre(self, linear: nn.Linear, x_TD: Tensor, mask_TD: Tensor, neuron: int) -> Tensor:
        """Return one neuron's pre-activation ``(T,)`` from the inputs that are kept."""
        product = (torch.where(mask_TD, x_TD, 0.0) * linear.weight[neuron]).sum(dim=-1)
        return product if linear.bias is None else product + linear.bias[neuron]

    def _neuron_by_neuron(self, hidden_TF: Tensor) -> Tensor:
        """Sum over hidden neurons one by one: ``y = Σ_i h_i W_down[:, i]``."""
        output = hidden_TF.new_zeros(len(hidden_TF), self.d_model)
        for i in range(self.d_ff):
            output = output + hidden_TF[:, i, None] * self.down_proj.weight[:, i]
        return output if self.down_proj.bias is None else output + self.down_proj.bias

    def _stats(
        self,
        hidden_TF: Tensor,
        mask_T: Tensor | None,
        by_input: Tensor | None,
        by_gate: Tensor | None,
        by_up_input: Tensor | None,
        by_hidden: Tensor | None,
    ) -> dict[str, Tensor]:
        load, active_T = neuron_load(hidden_TF, mask_T)
        tokens = load.counts.new_tensor(len(hidden_TF)) if mask_T is None else mask_T.sum()
        products = {"down": share(by_hidden, active_T)}
        if self.gated:
            products["gate"] = share(by_input, active_T)
            products["up"] = share(by_gate, active_T) * share(by_up_input, active_T)
        else:
            products["up"] = share(by_input, active_T)
        stats = {
            "tokens": tokens,
            "density": masked_mean(active_T / self.d_ff, mask_T),
            **{f"density_{name}": masked_mean(each, mask_T) for name, each in products.items()},
            "usage": usage(load.counts),
            "unevenness": kl_to_uniform(load.mass),
        }
        return {"expert_counts": load.counts, **stats} if self.d_ff <= MOST_COUNTS else stats

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count how often each neuron's hidden value is kept and not zero, and sum magnitudes."""
        x_TD, _, mask_T = self._flatten(hidden, context)
        return neuron_load(self._hidden(x_TD, context)[0], mask_T)[0]

    def cost(self) -> Cost:
        """Products as computed, which are dense: 4 d F FLOPs, 6 d F if gated.

        A token's active parameters are those its products need on average, by the shares that were
        found in calibration; all, where there was none.
        """
        found = self.selector.calibrated()
        matrix = self.d_model * self.d_ff
        products = {"down": found.hidden, "up": found.input}
        if self.gated:
            products |= {"gate": found.input, "up": found.gate * found.up_input}
        total = sum(p.numel() for p in self.parameters())
        dense = matrix * len(products)
        active = total - dense + round(matrix * sum(products.values()))
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=2 * dense,
            bytes_per_token=active * self.up_proj.weight.element_size(),
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
