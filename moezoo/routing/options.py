"""The options of a learned router, in groups that a configuration may leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number


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


@dataclass(frozen=True)
class LogitOptions:
    """From what the router reads to a logit per expert: ``cap(scale * (W x + b))``.

    Attributes:
        bias: add a learned bias to the logits (GPT-OSS).
        norm: normalise the router's input first, ``x / rms(x) * g / sqrt(d)`` with a learned g
            (Gemma 4).
        mlp: width of an MLP of three layers before the linear map, ZAYA's; 0 for none.
        norm_eps: added to the mean square where the router's input or the MLP is normalised.
        scale: factor on the logits (Muse Spark's output multiplier).
        softcap: cap c of the logits, ``c tanh(l / c)`` (Laguna); 0 for none.
    """

    bias: bool = False
    norm: bool = False
    mlp: int = 0
    norm_eps: float = 1e-6
    scale: float = 1.0
    softcap: float = 0.0

    def check(self) -> None:
        """Check the options.

        Raises:
            InputError: a value is out of range.
        """
        for name in ("bias", "norm"):
            check_flag(f"router.logits.{name}", getattr(self, name))
        check_int("router.logits.mlp", self.mlp, minimum=0)
        for name in ("norm_eps", "scale", "softcap"):
            check_number(f"router.logits.{name}", getattr(self, name))
        if not self.scale:
            raise InputError("router.logits.scale: 0 makes all experts equal; give 1 for no factor")


@dataclass(frozen=True)
class WeightOptions:
    """From the scores s of the chosen experts to weights, ``w = scale * s / (max(Σ s, m) + eps)``.

    Attributes:
        eps: added to the sum. None: 1e-20, as DeepSeek-V3 has it, or 0 with softmax.
        minimum: the sum is never taken to be less, m (Ernie 4.5).
        p: divide by the p-norm ``(Σ s^p)^(1/p)`` in place of the sum (DBRX).
        with_shared: the sum is over the shared experts too; each has a score from a row of its own
            in the router, and a weight (Inkling).
        learned_scale: a learned factor on all weights (Inkling).
        expert_scale: a learned factor on the weights of each expert (Gemma 4).
        apply_to: whether a weight multiplies the expert's ``output``, or its ``input`` (Llama 4),
            where ``E(w x)`` is not ``w E(x)``.
    """

    eps: float | None = None
    minimum: float = 0.0
    p: float = 1.0
    with_shared: bool = False
    learned_scale: bool = False
    expert_scale: bool = False
    apply_to: Literal["output", "input"] = "output"

    def check(self, normalize: bool) -> None:
        """Check the options.

        Args:
            normalize: whether weights are divided by anything.

        Raises:
            InputError: a value is out of range, or has no meaning without ``normalize``.
        """
        for name in ("with_shared", "learned_scale", "expert_scale"):
            check_flag(f"router.weights.{name}", getattr(self, name))
        if self.eps is not None:
            check_number("router.weights.eps", self.eps)
        check_number("router.weights.minimum", self.minimum)
        check_number("router.weights.p", self.p, minimum=1.0)
        check_choice("router.weights.apply_to", self.apply_to, ("output", "input"))
        for name in ("eps", "minimum", "p", "with_shared"):
            if not normalize and getattr(self, name) != getattr(WeightOptions, name):
                raise InputError(
                    f"router.weights.{name}: says how weights are normalized; set normalize to true"
                )


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
    threshold_decay: float = 0.9
    expert_dropout: float = 0.0
    select_on: Literal["score", "logit"] = "score"
    rounding: int = 0
    logits: LogitOptions = LogitOptions()
    weights: WeightOptions = WeightOptions()

    @property
    def is_ragged(self) -> bool:
        """Whether tokens have as many experts as follows, and not ``top_k`` each."""
        return self.choice != "token" or self.score == "relu"

    def check(self, num_experts: int, top_k: int, num_identity: int = 0) -> None:
        """Check the options against each other and the layer's sizes.

        Args:
            num_experts: experts N of the layer.
            top_k: experts that a token is routed to.
            num_identity: how many of the N compute nothing.

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
        self._check_selection_bias(num_identity)
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
        if self.closed_groups == "zero" and self.num_groups == 1:
            raise InputError("router.closed_groups: there is one group only; set num_groups")
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
        check_int("router.rounding", self.rounding, minimum=0)
        if self.rounding:
            self._check_rounding(num_identity)
        if self.is_ragged:
            self._check_ragged(num_identity)
        elif top_k == 1 and self.normalize and not self.weights.with_shared:
            raise InputError(
                "router.normalize: with top_k=1 a normalized weight is always 1 and the router "
                "never learns; set normalize to false"
            )

    def _check_selection_bias(self, num_identity: int) -> None:
        check_choice("router.bias_rule", self.bias_rule, ("sign", "quantile"))
        check_number("router.bias_update_rate", self.bias_update_rate)
        check_flag("router.bias_recentre", self.bias_recentre)
        for name in ("bias_rule", "bias_recentre"):
            if getattr(self, name) == getattr(RouterOptions, name):
                continue
            if not self.selection_bias:
                raise InputError(
                    f"router.{name}: there is no selection bias; set selection_bias to true"
                )
            if num_identity:
                raise InputError(
                    f"router.{name}: LongCat's rule moves the bias where there are identity "
                    f"experts; leave it at {str(getattr(RouterOptions, name)).lower()}"
                )
        if self.bias_rule == "quantile" and self.num_groups > 1:
            raise InputError(
                "router.bias_rule: quantile is not defined within groups; set num_groups to 1, or "
                "use sign"
            )

    def _check_sparse_mixer(self) -> None:
        for name in ("normalize", "noise", "selection_bias"):
            if getattr(self, name):
                raise InputError(f"router.{name}: has no meaning in sparse_mixer; set it to false")
        if self.num_groups > 1:
            raise InputError("router.num_groups: has no meaning in sparse_mixer; set it to 1")
        if self.select_on == "logit":
            raise InputError("router.select_on: sparse_mixer samples by the score; use score")

    def _check_rounding(self, num_identity: int) -> None:
        of = f"{self.choice} choice"
        if self.score in ("relu", "sparse_mixer"):
            of = f"{self.score} scores"
        if self.is_ragged or self.score == "sparse_mixer":
            raise InputError(f"router.rounding: has no meaning in {of}; set it to 0")
        if self.num_groups > 1:
            raise InputError(
                "router.rounding: is not defined within groups; set it to 0, or num_groups to 1"
            )
        if num_identity:
            raise InputError(
                "router.rounding: is not defined with num_identity_experts; set either to 0"
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

    def _check_ragged(self, num_identity: int) -> None:
        of = "relu scores" if self.choice == "token" else f"{self.choice} choice"
        if self.choice == "threshold" and self.score == "relu":
            raise InputError("router.score: relu has no meaning in threshold choice; use sigmoid")
        if self.choice == "expert" and self.score != "softmax":
            raise InputError("router.score: expert choice is defined with softmax; use softmax")
        if self.score == "sparse_mixer":
            raise InputError(f"router.score: sparse_mixer has no meaning in {of}; use softmax")
        if num_identity:
            raise InputError(f"num_identity_experts: have no meaning in {of}; set it to 0")
        for name in ("normalize", "noise", "selection_bias"):
            if getattr(self, name):
                raise InputError(f"router.{name}: has no meaning in {of}; set it to false")
        if self.expert_dropout:
            raise InputError(f"router.expert_dropout: has no meaning in {of}; set it to 0")
        if self.weights != WeightOptions():
            raise InputError(f"router.weights: {of} weighs by the scores as they are; leave it out")
        if self.select_on == "logit":
            raise InputError(f"router.select_on: in {of} it is the score that chooses; use score")
        if self.num_groups > 1:
            raise InputError(f"router.num_groups: has no meaning in {of}; set it to 1")
