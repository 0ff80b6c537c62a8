"""A learned router: a linear map from hidden states to experts, and the rule that picks.

Shapes: T tokens, D d_model, E experts, K choices per token, C tokens per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.routing import losses as L
from moezoo.routing import ragged
from moezoo.routing.balance import Choice, Logits, balance_losses
from moezoo.routing.balance_options import BalanceOptions, CapacityOptions
from moezoo.routing.capacity import Asked, exact_share, limit
from moezoo.routing.choose import within_groups
from moezoo.routing.deferred import statistics
from moezoo.routing.logits import normed_input, scaled_logits
from moezoo.routing.margins import margin_histogram
from moezoo.routing.mlp import RouterMLP
from moezoo.routing.model_sparsity import joined_scope
from moezoo.routing.options import RouterOptions
from moezoo.routing.rounding import round_tokens
from moezoo.routing.routing import Routing
from moezoo.routing.routing_stats import routing_stats
from moezoo.routing.scores import scores_of, shares_of
from moezoo.routing.selection_bias import StepLoad, kept_in_fp32, move_bias, selection_margins
from moezoo.routing.sparse_mixer import sparse_mixer
from moezoo.routing.weights import Chosen, Scales, weighed, weights_of_all
from moezoo.routing.wide_linear import wide_linear
from moezoo.training_state import TrainingState
from moezoo_kernels.dtypes import at_least_fp32, without_autocast

__all__ = ["Router", "Routing"]


class Router(TrainingState):
    """Score every expert for every token and choose.

    The arithmetic is fp32 whatever autocast says (fp64 for fp64 inputs): rounding a logit to bf16
    changes the choice.

    Args:
        d_model: width of what the router reads.
        num_experts: number of experts E.
        top_k: experts per token; on average, in expert choice.
        options: scores, choice, noise, groups, bias.
        balance: coefficients of the auxiliary losses.
        capacity: a limit on the tokens per expert; none by default (dropless).
        num_shared: shared experts S, read where the options weigh these too.
        num_idle: how many of the E, the last ones, compute nothing.
    """

    selection_bias: Tensor
    threshold: Tensor
    sparsity_weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        options: RouterOptions,
        balance: BalanceOptions,
        capacity: CapacityOptions | None = None,
        num_shared: int = 0,
        num_idle: int = 0,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_idle = num_idle
        self.num_experts = num_experts
        self.top_k = top_k
        self.options = options
        self.balance = balance
        self.capacity = capacity
        width = options.logits.mlp or d_model
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        if options.noise:
            self.noise_weight = nn.Parameter(torch.empty(num_experts, width))
        if options.logits.bias:
            self.bias = nn.Parameter(torch.empty(num_experts))
        if options.logits.mlp:
            how = options.logits
            self.mlp = RouterMLP(d_model, how.mlp, how.norm_eps, how.carry)
        if options.logits.norm:
            self.input_scale = nn.Parameter(torch.empty(d_model))
        if options.weights.with_shared:
            self.shared_weight = nn.Parameter(torch.empty(num_shared, width))
        if options.weights.learned_scale:
            self.learned_scale = nn.Parameter(torch.empty(1))
        if options.weights.expert_scale:
            self.expert_scale = nn.Parameter(torch.empty(num_experts))
        for name in self._wide_buffers():
            size = 1 if name == "sparsity_weight" else num_experts
            self.register_buffer(name, torch.empty(size, dtype=torch.float32))
        self._load = StepLoad()
        self._scope = joined_scope(balance) if options.score == "relu" else None
        self.reset_parameters()

    @property
    def capacity(self) -> CapacityOptions | None:
        """The limit on the tokens per expert; none in a dropless layer."""
        return self._capacity

    @capacity.setter
    def capacity(self, options: CapacityOptions | None) -> None:
        self._capacity = options
        factors = () if options is None else (options.factor, options.eval_factor)
        # Here and not in the forward pass: compilers do not trace fractions.
        self._shares = [exact_share(f, self.top_k, self.num_experts) for f in factors]

    def reset_parameters(self) -> None:
        """Draw the weight as Switch does, or zero it where noise breaks the tie (Shazeer)."""
        if self.options.noise:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.noise_weight)
        else:
            self._draw(self.weight)
        if self.options.weights.with_shared:
            self._draw(self.shared_weight)
        if self.options.logits.mlp:
            self.mlp.reset_parameters()
        factors = dict.fromkeys(("input_scale", "learned_scale", "expert_scale"), 1.0)
        for name, start in {**factors, "bias": 0.0}.items():
            if (parameter := self._parameters.get(name)) is not None:
                nn.init.constant_(parameter, start)
        starts = {"threshold": ragged.COLD, "sparsity_weight": self.balance.sparsity}
        for name in self._wide_buffers():
            nn.init.constant_(getattr(self, name), starts.get(name, 0.0))
        self._load = StepLoad()

    def _draw(self, weight: Tensor) -> None:
        # Switch: truncated normal at two standard deviations, std sqrt(0.1 / fan_in).
        std = (0.1 / weight.shape[-1]) ** 0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self._wide_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, kept_in_fp32(buffer, getattr(self, name)))
        return self

    def _wide_buffers(self) -> list[str]:
        """Name what steps move by less than 16 bits can tell apart."""
        there = {
            "selection_bias": self.options.selection_bias,
            "threshold": self.options.choice == "threshold",
            "sparsity_weight": self.options.score == "relu",
        }
        return [name for name, is_there in there.items() if is_there]

    def forward(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: tuple[int, int] | None = None,
        limited: bool = True,
        state_TR: Tensor | None = None,
    ) -> Routing:
        """Route.

        Args:
            hidden_TD: what the router reads; with ``jitter_experts`` jittered already.
            mask_T: true at real tokens; padding goes to no expert and is not counted.
            sequences: how many sequences of what length the T tokens are; default one.
            limited: whether the limit on capacity applies, if there is one.
            state_TR: what the router of the layer before handed on, if this one reads it.
        """
        with torch.autocast(hidden_TD.device.type, enabled=False):
            features_TD, state_TR = self._features(self._jittered(hidden_TD), state_TR)
            if self.options.is_ragged:
                routing = self._ragged(features_TD, mask_T)
            else:
                sequences = sequences or (1, len(hidden_TD))
                routing = self._tokens_choose(features_TD, mask_T, sequences, limited)
        return routing if state_TR is None else routing._replace(state=state_TR)

    def select(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: tuple[int, int] | None = None,
    ) -> Routing:
        """Return the routing of a call, without losses, statistics and state.

        Decoding one token, those take longer than the choice.
        """
        if self.training or self.options.is_ragged:
            return self(hidden_TD, mask_T, sequences)._replace(losses={}, stats={})
        with without_autocast(hidden_TD.device.type):
            hidden_TD, _ = self._features(hidden_TD, None)
            logits_TE = self._logits(hidden_TD)
            chosen = self._chosen(hidden_TD, scores_of(logits_TE, self.options.score), logits_TE)
            if mask_T is None and self.capacity is None:
                bound = chosen.indices.numel()
                return Routing(chosen.indices, chosen.weights, {}, {}, bound, chosen.shared_weights)
            chosen = chosen.masked(mask_T)
            sequences = sequences or (1, len(hidden_TD))
            left, _, bound = self._limit(chosen, mask_T, sequences)
            return Routing(left.indices, left.weights, {}, {}, bound, left.shared_weights)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        options = self.options.logits
        logits_TE = wide_linear(hidden_TD, self.weight, self.bias if options.bias else None)
        return scaled_logits(logits_TE, options)

    def _features(self, hidden_TD: Tensor, state_TR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what the linear map reads, and the state that is handed on, if there is one."""
        options = self.options.logits
        if options.norm:
            hidden_TD = normed_input(hidden_TD, self.input_scale, options.norm_eps)
        if not options.mlp:
            return hidden_TD, None
        state_TR = self.mlp.state(hidden_TD, state_TR)
        return self.mlp(state_TR), state_TR

    def jitter_of(self, hidden_TD: Tensor) -> Tensor | None:
        """Draw factors for what the router reads, in fp32 or wider; None without jitter."""
        jitter = self.options.jitter
        if not (self.training and jitter):
            return None
        return torch.empty_like(at_least_fp32(hidden_TD)).uniform_(1 - jitter, 1 + jitter)

    def _jittered(self, hidden_TD: Tensor) -> Tensor:
        factors_TD = None if self.options.jitter_experts else self.jitter_of(hidden_TD)
        return hidden_TD if factors_TD is None else at_least_fp32(hidden_TD) * factors_TD

    def _tokens_choose(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None,
        sequences: tuple[int, int],
        limited: bool,
    ) -> Routing:
        clean_TE = self._logits(hidden_TD)
        noisy_TE, std_TE = self._noisy(clean_TE, hidden_TD)
        scores_TE = scores_of(noisy_TE, self.options.score)
        probabilities_TE = shares_of(scores_TE, self.options.score)
        if self.training and self.options.expert_dropout:
            scores_TE = scores_TE * (torch.rand_like(scores_TE) >= self.options.expert_dropout)
        chosen = self._chosen(hidden_TD, scores_TE, noisy_TE).masked(mask_T)

        logits = Logits(clean_TE, noisy_TE, std_TE)
        choice = Choice(probabilities_TE, chosen.indices, chosen.weights)
        aux = balance_losses(self.balance, logits, choice, mask_T, sequences, self._load.counts)
        left, dropped, bound = self._limit(chosen, mask_T, sequences if limited else None)
        rounded = None
        if self.training and limited and self.options.rounding:
            raw_TE = weights_of_all(scores_TE, self.options, self._scales())
            rounded = round_tokens(chosen, scores_TE, raw_TE, mask_T, self.options.rounding)
            left, dropped, bound = rounded.chosen, rounded.dropped, rounded.max_assignments
        asked = (probabilities_TE, chosen.indices, chosen.weights, mask_T)
        stats = statistics(self, routing_stats, *asked, dropped, self.num_experts)
        if rounded is not None:
            stats = {**stats, **rounded.stats}
        if self.training and self.options.bias_rule == "quantile":
            margins_TE = selection_margins(self._selection(scores_TE, noisy_TE), self.top_k)
            stats = {**stats, "margins": margin_histogram(margins_TE, mask_T)}
        return Routing(left.indices, left.weights, aux, stats, bound, left.shared_weights)

    def _chosen(self, hidden_TD: Tensor, scores_TE: Tensor, logits_TE: Tensor) -> Chosen:
        """Choose experts and weigh them by their scores, and shared experts if asked."""
        options = self.options
        if options.score == "sparse_mixer":
            mixed = sparse_mixer(logits_TE, self.top_k, options.mixer_eps, self.training)
            return self._weigh(Chosen(mixed[0], mixed[1], None, mixed[1], None))
        indices_TK, shared_TS = self._choose(scores_TE, logits_TE), None
        if options.weights.with_shared:
            logits_TS = wide_linear(hidden_TD, self.shared_weight)
            logits_TS = scaled_logits(logits_TS, options.logits)
            shared_TS = scores_of(logits_TS, options.score)
        scores_TK = scores_TE.gather(1, indices_TK)
        return self._weigh(Chosen(indices_TK, scores_TK, shared_TS, scores_TK, shared_TS))

    def _weigh(self, chosen: Chosen) -> Chosen:
        """Take the scores for weights, normalised and scaled as asked."""
        # Weights that are normalised after dropping may all have been dropped.
        may_be_none = self.capacity is not None and self.capacity.normalize == "after"
        return weighed(chosen, self.options, self._scales(), may_be_none)

    def _scales(self) -> Scales:
        return Scales(getattr(self, "learned_scale", None), getattr(self, "expert_scale", None))

    def _noisy(self, clean_TE: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add ``N(0, 1) * softplus(x W_noise)`` while training (arXiv:1701.06538, eq. 4)."""
        if not (self.options.noise and self.training):
            return clean_TE, None
        # Without a floor the noise can vanish, and with it the gradient of the load loss.
        std_TE = F.softplus(wide_linear(hidden_TD, self.noise_weight)) + 1e-2
        return clean_TE + torch.randn_like(clean_TE) * std_TE, std_TE

    def _choose(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """Choose by scores or logits; a subclass may break ties of the ones by the others."""
        selection_TE = within_groups(self._selection(scores_TE, logits_TE), self.options)
        return selection_TE.topk(self.top_k, dim=-1).indices

    def _selection(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """Return the numbers that choose."""
        by_score = self.options.select_on == "score"
        selection_TE = (scores_TE if by_score else logits_TE).detach()
        if self.options.selection_bias:
            selection_TE = selection_TE + self.selection_bias
        return selection_TE

    def _limit(
        self, chosen: Chosen, mask_T: Tensor | None, sequences: tuple[int, int] | None
    ) -> tuple[Chosen, Tensor | None, int]:
        """Return what experts have room for, how many were dropped, how many may be left.

        Weights are zero where there is no expert. Without ``sequences`` there is room for all.
        """
        options, dropped, bound = self.capacity, None, chosen.indices.numel()
        if options is not None and sequences is not None:
            share = self._shares[0 if self.training else 1]
            threshold = options.second_choice_threshold if self.training else 0.0
            raw = options.normalize == "after"
            weights_TK = chosen.scores if raw else chosen.weights
            asked = Asked(chosen.indices, weights_TK, chosen.scores, mask_T, sequences)
            indices_TK, dropped, bound = limit(asked, self.num_experts, share, options, threshold)
            chosen = chosen._replace(indices=indices_TK)
            if raw:
                chosen = self._weigh(
                    chosen._replace(scores=chosen.scores.masked_fill(indices_TK < 0, 0.0))
                )
        weights_TK = chosen.weights.masked_fill(chosen.indices < 0, 0.0)
        return chosen._replace(weights=weights_TK), dropped, bound

    def _ragged(self, hidden_TD: Tensor, mask_T: Tensor | None) -> Routing:
        """Route each token to as many experts as take it."""
        logits_TE = self._logits(hidden_TD)
        threshold_E = self.threshold if self.options.choice == "threshold" else None
        taken = ragged.take(logits_TE, mask_T, self.options, self.top_k, threshold_E)
        aux = {}
        if self.balance.z_loss:
            aux["router_z"] = self.balance.z_loss * L.z_loss(logits_TE, mask_T)
        if self.options.score == "relu":
            loss = ragged.sparsity_loss(taken, mask_T, self._load, self.balance, self.top_k)
            loss = loss if self._scope is None else loss / self._scope.layers
            aux["sparsity"] = self.sparsity_weight.to(loss.dtype).squeeze(0) * loss
        shares_TE = shares_of(taken.scores, self.options.score)
        asked = (shares_TE, taken.indices, taken.weights, mask_T, None, self.num_experts)
        stats = statistics(self, routing_stats, *asked, self.options.choice != "expert")
        if self.training and threshold_E is not None:
            margins = ragged.threshold_margins(taken.scores, threshold_E, mask_T)
            stats = {**stats, "margins": margins}
        return Routing(taken.indices, taken.weights, aux, stats, taken.max_assignments)

    def observe(self, stats: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's expert counts to those of this optimizer step."""
        self._load.add(stats)
        if self._scope is not None:
            self._scope.add(stats, self.top_k)

    @torch.no_grad()
    def step(self, progress: float | None = None) -> None:
        """Move biases or thresholds by the load of the step just taken, then forget the load."""
        for name in self._wide_buffers():
            setattr(self, name, getattr(self, name).float())  # whatever was assigned
        if self.options.selection_bias:
            move_bias(self.selection_bias, self._load, self.options, self.top_k, self.num_idle)
        if self.options.choice == "threshold":
            decay = self.options.threshold_decay
            ragged.move_threshold(self.threshold, self._load, self.top_k, decay)
        if self.options.score == "relu":
            how = (self.balance, self.top_k, self._scope)
            ragged.move_sparsity(self.sparsity_weight, self._load, *how)
        self._load = StepLoad()

    def discard(self) -> None:
        """Forget the load since the last step."""
        self._load = StepLoad()
        if self._scope is not None:
            self._scope.forget()

    def defer_state(self) -> None:
        """Do nothing: such state is moved by :meth:`step` alone, whoever trains."""

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token: 2 d E, more with an MLP or shared experts."""
        shared = self.shared_weight.numel() if self.options.weights.with_shared else 0
        before = self.mlp.flops_per_token() if self.options.logits.mlp else 0
        return before + 2 * (self.weight.numel() + shared)
