"""The options of a learned router."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moezoo.arguments import as_options
from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number
from moezoo.routing.option_groups import LogitOptions, WeightOptions, refuse_idle


def check_top_k(top_k: int, num_experts: int) -> int:
    """Return ``top_k`` if a token can choose so many experts.

    Raises:
        InputError: it is not a whole number from 1 to ``num_experts``.
    """
    check_int("top_k", top_k)
    if top_k > num_experts:
        raise InputError(
            f"top_k: {top_k} is more than num_experts={num_experts}; "
            "lower top_k or raise num_experts"
        )
    return top_k


SCORES = ("softmax", "sigmoid", "sqrt_softplus", "sparse_mixer", "relu")
_NOT_CAUSAL = (
    ", balance.load_balancing to 0 and the model's allow_non_causal to true; the method "
    "expert_choice sets the first two"
)
"""What else is to be set where experts choose."""


@dataclass(frozen=True)
class RouterOptions:
    """How tokens and experts find each other.

    Attributes:
        choice: ``token``: each token takes its top_k experts. ``expert``: each expert takes its
            best tokens, top_k per token on average (arXiv:2202.09368); not causal. ``threshold``:
            each expert takes the tokens whose score is above its threshold, which follows the
            scores of earlier steps (arXiv:2603.11535): top_k per token on average, from none to
            all; causal.
        score: turn logits into scores by ``softmax`` over all experts, by ``sigmoid`` each or by
            ``sqrt_softplus`` each, the root of log(1 + e^l) (DeepSeek-V4). ``sparse_mixer``: a
            softmax over the logits near the best, from which experts are sampled in training, one
            after another (PhiMoE, arXiv:2409.12136).
        normalize: divide the selected scores by their sum (Mixtral, GShard, DeepSeek-V3).
        scale: factor on the weights after that (DeepSeek's routed_scaling_factor).
        noise: add Gaussian noise of learned size to the logits while training (arXiv:1701.06538).
        jitter: multiply the router's input by U(1 - jitter, 1 + jitter) while training (Switch).
        jitter_experts: what experts read is multiplied by the same numbers (Mixtral).
        mixer_eps: of ``sparse_mixer``: logits are near the best if they are below it by no more
            than twice this share of their size.
        num_groups: split the experts into this many groups; 1 for none (arXiv:2405.04434).
        top_groups: take experts only from this many groups per token.
        group_score: a group is as good as its best expert, ``max`` (DeepSeek-V2), or as the
            ``sum_of_two`` best (DeepSeek-V3), by the scores that choose. None: ``sum_of_two``
            with a selection bias, else ``max``.
        closed_groups: what experts of other groups choose with: ``exclude``, none is chosen; or
            ``zero``, the number 0, which wins over negative ones: with a selection bias below
            zero experts are chosen that no best group holds, as in A.X K2, which of them is up to
            ``torch.topk``.
        selection_bias: add a bias to the numbers that choose, not to the weights; it follows the
            load instead of a loss (arXiv:2408.15664).
        select_on: choose by the ``score`` or by the ``logit`` (Kolibri), with the bias on either;
            scores saturate, and a bias counts less where a sigmoid is steep.
        bias_rule: what moves the bias after an optimizer step. ``sign``: against the load by
            ``bias_update_rate``. ``quantile``: to where the scores of that step would have given
            each expert the same load, with no rate (quantile balancing, Su 2026).
        bias_update_rate: how far ``sign`` moves the bias per optimizer step.
        expected_experts: with experts that compute nothing, how many of a token's top_k are to
            compute on average, to which the selection bias steers: LongCat-Flash's K_e
            (arXiv:2509.01322). None: the share E / (E + I) of them.
        bias_recentre: after each step take the bias's mean away, which ``sign`` lets drift. Which
            experts are chosen changes with ``closed_groups: zero`` alone. ``quantile`` does so
            always.
        threshold_decay: what is left of a threshold in the moving average after a step.
        expert_dropout: while training, zero a token's score of an expert with this probability,
            without rescaling; it may be chosen all the same (arXiv:2310.10837, section 5). Sigmoid
            scores only.
        rounding: while training, round the number of tokens of each expert to the nearest multiple
            of this, by dropping those of least weight or adding the next best, which weigh their
            scores as they are (arXiv:2512.14080); not causal then. 0 for none.
        logits: bias, normalization, factor and cap of the logits.
        weights: how weights are normalized, and learned factors on them.
    """

    choice: Literal["token", "expert", "threshold"] = "token"
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "sparse_mixer", "relu"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    noise: bool = False
    jitter: float = 0.0
    jitter_experts: bool = False
    mixer_eps: float = 0.01
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "sum_of_two"] | None = None
    closed_groups: Literal["exclude", "zero"] = "exclude"
    selection_bias: bool = False
    bias_rule: Literal["sign", "quantile"] = "sign"
    bias_update_rate: float = 1e-3
    bias_recentre: bool = False
    expected_experts: float | None = None
    threshold_decay: float = 0.9
    expert_dropout: float = 0.0
    select_on: Literal["score", "logit"] = "score"
    rounding: int = 0
    logits: LogitOptions = LogitOptions()  # noqa: RUF009 - frozen
    weights: WeightOptions = WeightOptions()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        """Take groups of options that are given as mappings.

        Raises:
            InputError: a group is neither a mapping nor its options.
        """
        for name, options in (("logits", LogitOptions), ("weights", WeightOptions)):
            given = as_options(f"router.{name}", getattr(self, name), options)
            object.__setattr__(self, name, given)

    def computing(self, num_experts: int, top_k: int, num_idle: int) -> Fraction:
        """Return how many of a token's experts compute on average; arguments as of :meth:`check`.

        With experts that compute nothing that is what the selection bias steers to, or would.
        """
        if self.expected_experts is not None:
            return Fraction(str(self.expected_experts))
        return Fraction(top_k * (num_experts - num_idle), num_experts)

    @property
    def is_ragged(self) -> bool:
        """Whether tokens have as many experts as follows, and not ``top_k`` each."""
        return self.choice != "token" or self.score == "relu"

    def check(self, num_experts: int, top_k: int, num_idle: int = 0) -> None:
        """Check the options against each other and the layer's sizes.

        Args:
            num_experts: experts N of the layer.
            top_k: experts that a token is routed to.
            num_idle: how many of the N compute nothing.

        Raises:
            InputError: an option is out of range, or contradicts another or the sizes.
        """
        check_choice("router.choice", self.choice, ("token", "expert", "threshold"))
        check_choice("router.score", self.score, SCORES)
        check_choice("router.select_on", self.select_on, ("score", "logit"))
        self.logits.check()
        self.weights.check(self.normalize)
        check_number("router.scale", self.scale)
        check_number("router.jitter", self.jitter, maximum=1.0)
        check_flag("router.jitter_experts", self.jitter_experts)
        if self.jitter_experts and not self.jitter:
            raise InputError("router.jitter_experts: there is no jitter; set jitter above 0")
        check_number("router.mixer_eps", self.mixer_eps)
        if self.score == "sparse_mixer":
            self._check_sparse_mixer()
        else:
            reason = "is sparse_mixer's; set score to sparse_mixer, or leave it out"
            refuse_idle("router", self, ("mixer_eps",), reason)
        self._check_selection_bias(num_idle)
        if self.expected_experts is not None:
            self._check_expected(num_experts, top_k, num_idle)
        check_number("router.expert_dropout", self.expert_dropout, maximum=1.0)
        if self.expert_dropout and self.score != "sigmoid":
            raise InputError("router.expert_dropout: is defined for sigmoid scores; use sigmoid")
        if self.expert_dropout and self.select_on == "logit":
            raise InputError(
                "router.expert_dropout: acts on scores that choose; set select_on to score"
            )
        check_int("router.num_groups", self.num_groups, maximum=num_experts)
        check_int("router.top_groups", self.top_groups, maximum=self.num_groups)
        if self.group_score is not None:
            check_choice("router.group_score", self.group_score, ("max", "sum_of_two"))
        check_choice("router.closed_groups", self.closed_groups, ("exclude", "zero"))
        if self.num_groups == 1:
            reason = "there is one group only; set num_groups"
            refuse_idle("router", self, ("group_score", "closed_groups"), reason)
        group = num_experts // self.num_groups
        if num_experts % self.num_groups:
            raise InputError(
                f"router.num_groups: {self.num_groups} does not divide num_experts={num_experts}; "
                "give a divisor"
            )
        if top_k > group * self.top_groups:
            raise InputError(
                f"router.top_groups: {self.top_groups} groups of {group} experts "
                f"hold fewer than top_k={top_k}; raise top_groups or lower top_k"
            )
        if self.weights.with_shared and self.score not in ("sigmoid", "sqrt_softplus"):
            raise InputError(
                "router.weights.with_shared: a softmax is over routed experts only; set score to "
                "sigmoid or sqrt_softplus"
            )
        if self.weights.with_shared and self.logits.bias:
            raise InputError(
                "router.logits.bias: logits of shared experts have none; set it to false"
            )
        if self.weights.with_shared and self.weights.apply_to == "input":
            raise InputError(
                "router.weights.apply_to: weights of shared experts multiply their output; use "
                "output, or set with_shared to false"
            )
        check_number("router.threshold_decay", self.threshold_decay, maximum=1.0)
        if self.choice != "threshold":
            reason = "is threshold choice's; set choice to threshold, or leave it out"
            refuse_idle("router", self, ("threshold_decay",), reason)
        check_int("router.rounding", self.rounding, minimum=0)
        if self.rounding:
            self._check_rounding(num_idle)
        if self.is_ragged:
            self._check_ragged(num_idle)
        elif top_k == 1 and self.normalize and not self.weights.with_shared:
            raise InputError(
                "router.normalize: with top_k=1 a normalized weight is always 1 and the router "
                "never learns; set normalize to false"
            )
        if self.num_groups == self.top_groups > 1:
            raise InputError(
                f"router.top_groups: a token takes experts from all {self.num_groups} groups; "
                "lower it, or set num_groups and top_groups to 1"
            )

    def _check_selection_bias(self, num_idle: int) -> None:
        check_choice("router.bias_rule", self.bias_rule, ("sign", "quantile"))
        check_number("router.bias_update_rate", self.bias_update_rate)
        check_flag("router.bias_recentre", self.bias_recentre)
        if not self.selection_bias:
            reason = "there is no selection bias; set selection_bias to true"
            names = ("bias_rule", "bias_update_rate", "bias_recentre", "expected_experts")
            refuse_idle("router", self, names, reason)
        if num_idle:
            reason = "LongCat's rule moves the bias where some compute nothing; leave it out"
            refuse_idle("router", self, ("bias_rule", "bias_recentre"), reason)
        if self.bias_rule == "quantile":
            reason = "quantile has no rate and centres the bias itself; leave it out"
            refuse_idle("router", self, ("bias_update_rate", "bias_recentre"), reason)
        if self.bias_rule == "quantile" and self.num_groups > 1:
            raise InputError(
                "router.bias_rule: quantile is not defined within groups; set num_groups to 1, or "
                "use sign"
            )

    def _check_expected(self, num_experts: int, top_k: int, num_idle: int) -> None:
        most = min(top_k, num_experts - num_idle)
        if not num_idle:
            raise InputError(
                "router.expected_experts: all experts compute; set num_identity_experts or "
                "num_skip_experts"
            )
        asked = check_number("router.expected_experts", self.expected_experts, maximum=most)
        least = max(top_k - num_idle, 0)
        if not asked or asked < least:
            raise InputError(
                f"router.expected_experts: {asked:g} is out of range; give a number > 0, ≥ {least} "
                f"and ≤ {most}, as {num_idle} experts compute nothing"
            )

    def _check_sparse_mixer(self) -> None:
        for name in ("normalize", "noise", "selection_bias"):
            if getattr(self, name):
                raise InputError(f"router.{name}: has no meaning in sparse_mixer; set it to false")
        if self.num_groups > 1:
            raise InputError("router.num_groups: has no meaning in sparse_mixer; set it to 1")
        if self.select_on == "logit":
            raise InputError("router.select_on: sparse_mixer samples by the score; use score")

    def _check_rounding(self, num_idle: int) -> None:
        of = f"{self.choice} choice"
        if self.score in ("relu", "sparse_mixer"):
            of = f"{self.score} scores"
        if self.is_ragged or self.score == "sparse_mixer":
            raise InputError(f"router.rounding: has no meaning in {of}; set it to 0")
        if self.num_groups > 1:
            raise InputError(
                "router.rounding: is not defined within groups; set it to 0, or num_groups to 1"
            )
        if num_idle:
            raise InputError(
                "router.rounding: is not defined with num_identity_experts or num_skip_experts; "
                "set it or these to 0"
            )
        if self.weights.with_shared:
            raise InputError(
                "router.rounding: is not defined with weights.with_shared; set it to 0, or "
                "with_shared to false"
            )
        if self.weights.apply_to == "input":
            raise InputError(
                "router.rounding: weighs outputs alone; set it to 0, or weights.apply_to to output"
            )

    def _check_ragged(self, num_idle: int) -> None:
        of = "relu scores" if self.choice == "token" else f"{self.choice} choice"
        if self.choice == "threshold" and self.score == "relu":
            raise InputError("router.score: relu has no meaning in threshold choice; use sigmoid")
        if self.choice == "expert" and self.score != "softmax":
            raise InputError("router.score: expert choice is defined with softmax; use softmax")
        if self.score == "sparse_mixer":
            raise InputError(f"router.score: sparse_mixer has no meaning in {of}; use softmax")
        if num_idle:
            raise InputError(
                f"num_identity_experts: have no meaning in {of}, nor have num_skip_experts; set "
                "both to 0"
            )
        for name in ("normalize", "noise", "selection_bias"):
            if getattr(self, name):
                more = _NOT_CAUSAL if self.choice == "expert" and name == "normalize" else ""
                raise InputError(f"router.{name}: has no meaning in {of}; set it to false{more}")
        if self.expert_dropout:
            raise InputError(f"router.expert_dropout: has no meaning in {of}; set it to 0")
        if self.weights != WeightOptions():
            raise InputError(f"router.weights: {of} weighs by the scores as they are; leave it out")
        if self.select_on == "logit":
            raise InputError(f"router.select_on: in {of} it is the score that chooses; use score")
        if self.num_groups > 1:
            raise InputError(f"router.num_groups: has no meaning in {of}; set it to 1")
