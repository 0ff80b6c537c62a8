"""The options of a router's balance and of a limit on the tokens per expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.routing.option_groups import refuse_idle
from moezoo.routing.options import RouterOptions

_LOSSES = ("load_balancing", "importance", "load", "sequence", "entropy")
"""Coefficients of losses that are defined where each token takes top_k experts."""


@dataclass(frozen=True)
class BalanceOptions:
    """Coefficients of the losses that keep experts evenly used; 0 leaves a loss out.

    Attributes:
        load_balancing: Switch's E Σ f_e P_e (arXiv:2101.03961, eq. 4); 1.0 when even.
        z_loss: mean squared logsumexp of the logits (arXiv:2202.08906, eq. 5).
        importance: squared coefficient of variation of the summed weights (arXiv:1701.06538).
        load: the same of the expected load; needs ``router.noise`` for a gradient.
        sequence: the load-balancing loss within each sequence (arXiv:2412.19437, eq. 17).
        entropy: Σ_e p_e log p_e of the mean softmax p over the batch, least (-log E) when even
            (arXiv:2310.10837, section 5).
        sparsity: with ``router.score: relu``, where the coefficient λ of ReMoE's loss begins. The
            loss is λ times the mean over tokens of Σ_e f_e g_e, f_e = E c_e / (k T)
            (arXiv:2412.14711); no other loss but ``z_loss`` is taken then.
        sparsity_growth: λ is multiplied by it after a step in which tokens had more than k experts
            on average, and divided by it otherwise.
        sparsity_scope: whose sparsity λ follows: that of each ``layer``, or the mean of the layers
            of a ``model``, as in the paper, whose loss is the mean of theirs. The layers are those
            that the decoder, :func:`moezoo.swap` or one :func:`moezoo.shared_values` builds.
        scope: take f over the ``global`` batch (all ranks, all micro-batches so far) or the
            ``local`` one; global leaves experts free to specialise (arXiv:2501.11873). The p of
            ``entropy`` is then over all ranks.
        count: f counts every ``selected`` expert, or a token's ``first_choice`` only (GShard).
    """

    load_balancing: float = 0.01
    z_loss: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    sequence: float = 0.0
    entropy: float = 0.0
    sparsity: float = 1e-8
    sparsity_growth: float = 1.2
    sparsity_scope: Literal["layer", "model"] = "layer"
    scope: Literal["global", "local"] = "global"
    count: Literal["selected", "first_choice"] = "selected"

    def check(self, router: RouterOptions | None = None) -> None:
        """Check the options.

        Args:
            router: options of the router that is balanced; None: not known yet.

        Raises:
            InputError: a value is out of range, or has no effect.
        """
        for name in (*_LOSSES, "z_loss", "sparsity"):
            check_number(f"balance.{name}", getattr(self, name))
        check_number("balance.sparsity_growth", self.sparsity_growth, minimum=1.0)
        check_choice("balance.sparsity_scope", self.sparsity_scope, ("layer", "model"))
        check_choice("balance.scope", self.scope, ("global", "local"))
        check_choice("balance.count", self.count, ("selected", "first_choice"))
        if router is not None:
            self._check_effect(router)

    def _check_effect(self, router: RouterOptions) -> None:
        if router.is_ragged:
            of = "relu scores" if router.score == "relu" else f"{router.choice} choice"
            self._refuse_idle(_LOSSES, f"has no meaning in {of}; set it to 0")
        if router.score != "relu":
            reason = "is the loss of relu scores; set router.score to relu, or leave it out"
            self._refuse_idle(("sparsity", "sparsity_growth", "sparsity_scope"), reason)
        if self.load and not router.noise:
            raise InputError(
                "balance.load: has no gradient without noise; set router.noise to true, or it to 0"
            )
        by_tokens = not router.is_ragged
        if not (by_tokens and self.load_balancing):
            reason = "says what load_balancing counts, which is not there; leave it out"
            self._refuse_idle(("count",), reason)
        sums = router.score == "relu" or (by_tokens and (self.load_balancing or self.entropy))
        if not sums:
            reason = "there is no loss that is summed over ranks; leave it out"
            self._refuse_idle(("scope",), reason)

    def _refuse_idle(self, names: tuple[str, ...], reason: str) -> None:
        """Refuse what has no effect; a coefficient of 0 asks for none."""
        refuse_idle("balance", self, tuple(n for n in names if getattr(self, n)), reason)


@dataclass(frozen=True)
class CapacityOptions:
    """A limit on the tokens one expert takes: ``ceil(factor * top_k * tokens / num_experts)``.

    In exact arithmetic on the factor as it was written; never more than the tokens there are.
    All first choices are served before any second choice; what overflows adds nothing
    (arXiv:2006.16668, algorithm 1; arXiv:2101.03961, eq. 3).

    Attributes:
        factor: capacity factor while training.
        eval_factor: capacity factor in evaluation.
        minimum: an expert's capacity is never below this, unless there are fewer tokens.
        second_choice_threshold: while training, keep a later choice of weight g with probability
            min(1, g / threshold); 0 keeps all.
        fixed: so many tokens per expert, whatever the factors and the minimum (transformers'
            ``expert_capacity``). None: those of the factors.
        scope: tokens are those of the ``batch``, or of a ``sequence``: each has the same room in
            every expert, and takes none from the others (Switch in transformers).
        order: tokens are served by their ``position``, or the one with the largest score first
            (``score``: batch prioritized routing, arXiv:2106.05974, section 4; NLLB).
        normalize: weights are normalized over the chosen experts (``before`` dropping), or over
            those that are left (``after``; NLLB), by whose raw scores second choices are kept then.
    """

    factor: float = 1.25
    eval_factor: float = 2.0
    minimum: int = 1
    second_choice_threshold: float = 0.0
    fixed: int | None = None
    scope: Literal["batch", "sequence"] = "batch"
    order: Literal["position", "score"] = "position"
    normalize: Literal["before", "after"] = "before"

    def check(self, router: RouterOptions, top_k: int) -> None:
        """Check the options.

        Args:
            router: options of the router whose choices are limited.
            top_k: experts per token.

        Raises:
            InputError: a value is out of range, has no effect, or contradicts the router's.
        """
        if router.choice == "expert":
            raise InputError("capacity: expert choice fills every expert exactly; set it to null")
        if router.is_ragged:
            of = "relu scores set" if router.score == "relu" else "threshold choice sets"
            raise InputError(f"capacity: {of} how many tokens come; set it to null")
        if router.rounding:
            raise InputError("capacity: is not defined with router.rounding; set it to null")
        check_number("capacity.factor", self.factor)
        check_number("capacity.eval_factor", self.eval_factor)
        check_int("capacity.minimum", self.minimum, minimum=0)
        check_number("capacity.second_choice_threshold", self.second_choice_threshold)
        if self.fixed is not None:
            check_int("capacity.fixed", self.fixed)
            reason = "fixed is the capacity, whatever the factors; leave either out"
            refuse_idle("capacity", self, ("factor", "eval_factor", "minimum"), reason)
        if top_k == 1:
            reason = "there are no second choices; leave it out, or raise top_k"
            refuse_idle("capacity", self, ("second_choice_threshold",), reason)
        check_choice("capacity.scope", self.scope, ("batch", "sequence"))
        check_choice("capacity.order", self.order, ("position", "score"))
        check_choice("capacity.normalize", self.normalize, ("before", "after"))
        if self.normalize == "after" and not router.normalize:
            raise InputError(
                "capacity.normalize: weights are not normalized; set router.normalize to true"
            )
