"""A learned router: a linear map from hidden states to experts, and the rule that picks.

Shapes: T tokens, D d_model, E experts, K choices per token, C tokens per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.routing import losses as L
from moezoo.routing.capacity import capacity_of, exact_share, within_capacity
from moezoo.routing.deferred import statistics
from moezoo.routing.options import BalanceOptions, CapacityOptions, RouterOptions
from moezoo.routing.stats import count_tokens, expert_counts, mean_entropy, slot_stats
from moezoo.routing.wide_linear import wide_linear
from moezoo.training_state import TrainingState
from moezoo_kernels.dtypes import at_least_fp32, without_autocast


class Routing(NamedTuple):
    """The experts each token is routed to, and their weights.

    Attributes:
        indices: ``(T, K)`` int64 experts, -1 for none. K is E in expert choice.
        weights: ``(T, K)`` in fp32 (fp64 for fp64 inputs), zero where there is no expert.
        losses: weighted scalars.
        stats: detached statistics.
        max_assignments: an upper bound on the number of indices that are not -1.
    """

    indices: Tensor
    weights: Tensor
    losses: dict[str, Tensor]
    stats: Mapping[str, Tensor]
    max_assignments: int


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
        num_identity: how many of the E, the last ones, compute nothing.
    """

    selection_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        options: RouterOptions,
        balance: BalanceOptions,
        capacity: CapacityOptions | None = None,
        num_identity: int = 0,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_identity = num_identity
        self.num_experts = num_experts
        self.top_k = top_k
        self.options = options
        self.balance = balance
        self.capacity = capacity
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        if options.noise:
            self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model))
        if options.selection_bias:
            self.register_buffer("selection_bias", torch.empty(num_experts, dtype=torch.float32))
        self._step_counts: Tensor | None = None
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
            # Switch: truncated normal at two standard deviations, std sqrt(0.1 / fan_in).
            std = (0.1 / self.d_model) ** 0.5
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.options.selection_bias:
            nn.init.zeros_(self.selection_bias)
        self._step_counts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The bias moves by 1e-3 at a time, which bf16 rounds away: let it change device, not dtype.
        before = self.selection_bias if self.options.selection_bias else None
        super()._apply(fn, recurse)
        if before is not None:
            after = self.selection_bias
            self.selection_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def forward(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None = None,
        sequences: tuple[int, int] | None = None,
        limited: bool = True,
    ) -> Routing:
        """Route.

        Args:
            hidden_TD: what the router reads.
            mask_T: true at real tokens; padding goes to no expert and is not counted.
            sequences: how many sequences of what length the T tokens are; default one.
            limited: whether the limit on capacity applies, if there is one.
        """
        with torch.autocast(hidden_TD.device.type, enabled=False):
            if self.options.choice == "expert":
                return self._experts_choose(hidden_TD, mask_T)
            sequences = sequences or (1, len(hidden_TD))
            return self._tokens_choose(hidden_TD, mask_T, sequences, limited)

    def select(self, hidden_TD: Tensor, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        """Return indices, weights and bound of a call, without losses and statistics.

        Decoding one token, those take longer than the choice.
        """
        if self.training or self.options.choice == "expert":
            routing = self(hidden_TD, mask_T)
            return routing.indices, routing.weights, routing.max_assignments
        with without_autocast(hidden_TD.device.type):
            logits_TE = self._logits(hidden_TD, self.weight)
            indices_TK, weights_TK = self._weighted(self._scores(logits_TE), logits_TE)
            bound = indices_TK.numel()
            if mask_T is not None:
                indices_TK = indices_TK.masked_fill(~mask_T.unsqueeze(-1), -1)
            if self.capacity is not None:
                indices_TK, _, bound = self._limit(indices_TK, weights_TK, mask_T, self.capacity)
            if mask_T is not None or self.capacity is not None:
                weights_TK = weights_TK.masked_fill(indices_TK < 0, 0.0)
            return indices_TK, weights_TK, bound

    def _logits(self, hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return wide_linear(hidden_TD, weight_ED)

    def _jittered(self, hidden_TD: Tensor) -> Tensor:
        jitter = self.options.jitter
        if not (self.training and jitter):
            return hidden_TD
        hidden_TD = at_least_fp32(hidden_TD)
        return hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - jitter, 1 + jitter)

    def _tokens_choose(
        self,
        hidden_TD: Tensor,
        mask_T: Tensor | None,
        sequences: tuple[int, int],
        limited: bool,
    ) -> Routing:
        hidden_TD = self._jittered(hidden_TD)
        clean_TE = self._logits(hidden_TD, self.weight)
        noisy_TE, std_TE = self._noisy(clean_TE, hidden_TD)
        scores_TE = probabilities_TE = self._scores(noisy_TE)
        if self.options.score != "softmax":
            probabilities_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training and self.options.expert_dropout:
            scores_TE = scores_TE * (torch.rand_like(scores_TE) >= self.options.expert_dropout)
        indices_TK, weights_TK = self._weighted(scores_TE, noisy_TE)
        if mask_T is not None:
            indices_TK = indices_TK.masked_fill(~mask_T.unsqueeze(-1), -1)

        aux = self._losses(clean_TE, probabilities_TE, indices_TK, mask_T, sequences)
        if self.balance.importance:
            kept = weights_TK.masked_fill(indices_TK < 0, 0.0)
            gates_TE = torch.zeros_like(scores_TE).scatter(1, indices_TK.clamp(min=0), kept)
            aux["importance"] = self.balance.importance * L.cv_squared(gates_TE.sum(dim=0))
        if self.balance.load:
            aux["load"] = self.balance.load * L.cv_squared(
                self._load(clean_TE, noisy_TE, std_TE, indices_TK, mask_T)
            )
        asked, dropped = (probabilities_TE, indices_TK, weights_TK, mask_T), None
        bound = indices_TK.numel()
        if limited and self.capacity is not None:
            indices_TK, dropped, bound = self._limit(indices_TK, weights_TK, mask_T, self.capacity)
        stats = statistics(self, self._stats, *asked, dropped)
        weights_TK = weights_TK.masked_fill(indices_TK < 0, 0.0)
        return Routing(indices_TK, weights_TK, aux, stats, bound)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        softmax = self.options.score == "softmax"
        return logits_TE.softmax(dim=-1) if softmax else logits_TE.sigmoid()

    def _weighted(self, scores_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts and weight them by their scores, normalised and scaled as asked."""
        indices_TK = self._choose(scores_TE, logits_TE)
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.options.normalize:
            total = weights_TK.sum(dim=-1, keepdim=True)
            # Sigmoids may all underflow; the constant is DeepSeek-V3's.
            softmax = self.options.score == "softmax"
            weights_TK = weights_TK / (total if softmax else total + 1e-20)
        return indices_TK, weights_TK * self.options.scale

    def _noisy(self, clean_TE: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add ``N(0, 1) * softplus(x W_noise)`` while training (arXiv:1701.06538, eq. 4)."""
        if not (self.options.noise and self.training):
            return clean_TE, None
        # Without a floor the noise can vanish, and with it the gradient of the load loss.
        std_TE = F.softplus(self._logits(hidden_TD, self.noise_weight)) + 1e-2
        return clean_TE + torch.randn_like(clean_TE) * std_TE, std_TE

    def _choose(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """Choose by the scores; a subclass may break their ties by the logits."""
        options = self.options
        selection_TE = scores_TE.detach()
        if options.selection_bias:
            selection_TE = selection_TE + self.selection_bias
        if options.num_groups > 1:
            groups_TGN = selection_TE.unflatten(1, (options.num_groups, -1))
            default = "sum_of_two" if options.selection_bias else "max"
            of = 2 if (options.group_score or default) == "sum_of_two" else 1
            best = groups_TGN.topk(min(of, groups_TGN.shape[-1]), dim=-1).values.sum(dim=-1)
            chosen = best.topk(options.top_groups, dim=-1).indices
            closed = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
            selection_TE = groups_TGN.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
        return selection_TE.topk(self.top_k, dim=-1).indices

    def _losses(
        self,
        logits_TE: Tensor,
        probabilities_TE: Tensor,
        indices_TK: Tensor,
        mask_T: Tensor | None,
        sequences: tuple[int, int],
    ) -> dict[str, Tensor]:
        balance = self.balance
        aux = {}
        if balance.load_balancing:
            counts_E = self._assigned(indices_TK)
            p_E = self._mean_probability(probabilities_TE, mask_T)
            aux["load_balancing"] = balance.load_balancing * L.load_balancing_loss(counts_E, p_E)
        if balance.z_loss:
            aux["router_z"] = balance.z_loss * L.z_loss(logits_TE, mask_T)
        if balance.sequence:
            aux["sequence_balance"] = balance.sequence * L.sequence_balance_loss(
                indices_TK.reshape(*sequences, self.top_k),
                probabilities_TE.reshape(*sequences, self.num_experts),
                None if mask_T is None else mask_T.reshape(sequences),
            )
        if balance.entropy:
            aux["entropy"] = balance.entropy * L.negative_entropy(
                logits_TE, mask_T, over_ranks=balance.scope == "global"
            )
        return aux

    def _assigned(self, indices_TK: Tensor) -> Tensor:
        first_only = self.balance.count == "first_choice"
        counts_E = expert_counts(indices_TK[:, :1] if first_only else indices_TK, self.num_experts)
        if self.balance.scope == "global":
            # The counts of earlier micro-batches of this optimizer step count every choice; with
            # first choices only, each micro-batch stands for itself.
            if self._step_counts is not None and not first_only:
                counts_E = counts_E + self._step_counts
            counts_E = L.sum_over_ranks(counts_E)
        return counts_E

    def _mean_probability(self, probabilities_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        if self.balance.scope == "local" or mask_T is None:
            return L.masked_mean(probabilities_TE, mask_T)
        # Ranks may hold different numbers of real tokens; data parallelism averages gradients over
        # ranks, so each divides by the mean number to arrive at the mean over the global batch.
        tokens = L.sum_over_ranks(mask_T.sum()) / L.world_size()
        return (probabilities_TE * mask_T.unsqueeze(-1)).sum(dim=0) / tokens.clamp(min=1)

    def _load(
        self,
        clean_TE: Tensor,
        noisy_TE: Tensor,
        std_TE: Tensor | None,
        indices_TK: Tensor,
        mask_T: Tensor | None,
    ) -> Tensor:
        if std_TE is None or self.top_k == self.num_experts:
            return expert_counts(indices_TK, self.num_experts).to(clean_TE.dtype)
        return L.expected_load(clean_TE, noisy_TE, std_TE, self.top_k, mask_T)

    def _stats(
        self,
        probabilities_TE: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        mask_T: Tensor | None,
        dropped: Tensor | None,
    ) -> dict[str, Tensor]:
        experts = self.num_experts
        stats = slot_stats(indices_TK, weights_TK, experts, mask_T, most_counts=experts)
        stats["router_entropy"] = mean_entropy(probabilities_TE, mask_T)
        stats["dropped"] = torch.zeros_like(stats["tokens"]) if dropped is None else dropped
        return stats

    def _limit(
        self,
        indices_TK: Tensor,
        weights_TK: Tensor,
        mask_T: Tensor | None,
        options: CapacityOptions,
    ) -> tuple[Tensor, Tensor, int]:
        """Apply the capacity limit: give indices, how many were dropped, how many may be left."""
        tokens, top_k = indices_TK.shape
        if self.training and options.second_choice_threshold:
            keep = weights_TK.detach() / options.second_choice_threshold
            keep[:, 0] = 1.0
            indices_TK = indices_TK.masked_fill(torch.rand_like(keep) >= keep, -1)
        share = self._shares[0 if self.training else 1]
        capacity = capacity_of(count_tokens(indices_TK, mask_T), share, options.minimum)
        served = within_capacity(indices_TK, self.num_experts, capacity)
        dropped = ((indices_TK >= 0) & ~served).sum()
        # Exact numbers grow with the count of tokens, padding included: this one is never too low.
        bound = self.num_experts * cast("int", capacity_of(tokens, share, options.minimum))
        return indices_TK.masked_fill(~served, -1), dropped, min(tokens * top_k, bound)

    def _experts_choose(self, hidden_TD: Tensor, mask_T: Tensor | None) -> Routing:
        """Route to each expert its C best tokens (arXiv:2202.09368, section 3.2)."""
        logits_TE = self._logits(self._jittered(hidden_TD), self.weight)
        scores_TE = logits_TE.softmax(dim=-1)
        tokens = scores_TE.shape[0]
        real = tokens if mask_T is None else mask_T.sum()
        room = min(tokens, -(-tokens * self.top_k // self.num_experts))
        ranking_TE = scores_TE.detach()
        if mask_T is not None:
            ranking_TE = ranking_TE.masked_fill(~mask_T.unsqueeze(-1), -1.0)
        best_CE = ranking_TE.topk(room, dim=0).indices
        place_C1 = torch.arange(room, device=best_CE.device).unsqueeze(-1)
        taken_CE = (place_C1 < -(-real * self.top_k // self.num_experts)) & (place_C1 < real)
        taken_CE = taken_CE.expand_as(best_CE)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, best_CE, taken_CE)
        experts_E = torch.arange(self.num_experts, device=hidden_TD.device)
        indices_TE = torch.where(chosen_TE, experts_E, -1)
        weights_TE = scores_TE.masked_fill(~chosen_TE, 0.0) * self.options.scale
        aux = {}
        if self.balance.z_loss:
            aux["router_z"] = self.balance.z_loss * L.z_loss(logits_TE, mask_T)
        stats = statistics(self, self._stats, scores_TE, indices_TE, weights_TE, mask_T, None)
        return Routing(indices_TE, weights_TE, aux, stats, room * self.num_experts)

    def observe(self, stats: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's expert counts to those of this optimizer step."""
        counts = stats["expert_counts"].detach()
        self._step_counts = counts if self._step_counts is None else self._step_counts + counts

    @torch.no_grad()
    def step(self) -> None:
        """Move the selection bias against the load of the step just taken, then forget the load.

        ``b_e += rate * sign(mean(c) - c_e)`` with c summed over ranks and micro-batches
        (arXiv:2408.15664, algorithm 1). With identity experts it is LongCat-Flash's
        ``b_e += rate * (1 / E - c_e / Σ c)`` (arXiv:2509.01322, section 2.1), for the experts that
        compute alone, so that those of identity take the rest: on average a token then has
        ``K (E - I) / E`` experts that compute.
        """
        if self.options.selection_bias and self._step_counts is not None:
            counts_E = L.sum_over_ranks(self._step_counts).float()
            direction_E = (counts_E.mean() - counts_E).sign()
            if self.num_identity:
                direction_E = 1 / self.num_experts - counts_E / counts_E.sum().clamp(min=1)
                direction_E[-self.num_identity :] = 0.0
            self.selection_bias += self.options.bias_update_rate * direction_E
        self._step_counts = None

    def discard(self) -> None:
        """Forget the load since the last step."""
        self._step_counts = None

    def defer_state(self) -> None:
        """Do nothing: the bias is moved by :meth:`step` alone, whoever trains."""
