"""The groups of a router's options: what is done before the choice of experts, and after.

Options that have no effect are refused, unless they have their default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number


def refuse_idle(group: str, options: Any, names: tuple[str, ...], reason: str) -> None:
    """Refuse options that have no effect, unless they have their default.

    Args:
        group: where a configuration has them.
        options: a dataclass.
        names: of its fields.
        reason: why they have none, and the fix.

    Raises:
        InputError: names the first that is not at its default.
    """
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise InputError(f"{group}.{name}: {reason}")


@dataclass(frozen=True)
class LogitOptions:
    """From what the router reads to a logit per expert: ``cap(scale * (W x + b))``.

    Attributes:
        bias: add a learned bias to the logits (GPT-OSS).
        norm: normalise the router's input first, ``x / rms(x) * g / sqrt(d)`` with a learned g
            (Gemma 4).
        mlp: width R of an MLP of three layers before the linear map, ZAYA's; 0 for none. What its
            first layer gives is handed on to the next layer's router.
        norm_eps: added to the mean square where the router's input or the MLP is normalised.
        scale: factor on the logits (Muse Spark's output multiplier).
        softcap: cap c of the logits, ``c tanh(l / c)`` (Laguna); 0 for none.
        carry: add what the layer before handed on, times a learned vector, to what the MLP's first
            layer gives (ZAYA); the first layer of a model, which is given nothing, adds zero.
    """

    bias: bool = False
    norm: bool = False
    mlp: int = 0
    norm_eps: float = 1e-6
    scale: float = 1.0
    softcap: float = 0.0
    carry: bool = False

    def check(self) -> None:
        """Check the options.

        Raises:
            InputError: a value is out of range.
        """
        for name in ("bias", "norm", "carry"):
            check_flag(f"router.logits.{name}", getattr(self, name))
        check_int("router.logits.mlp", self.mlp, minimum=0)
        for name in ("norm_eps", "scale", "softcap"):
            check_number(f"router.logits.{name}", getattr(self, name))
        if not self.scale:
            raise InputError("router.logits.scale: 0 makes all experts equal; give 1 for no factor")
        if not self.mlp:
            reason = "there is no MLP whose state it is; set mlp"
            refuse_idle("router.logits", self, ("carry",), reason)
        if not (self.norm or self.mlp):
            reason = "there is no norm it belongs to; set norm or mlp"
            refuse_idle("router.logits", self, ("norm_eps",), reason)


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
        if not normalize:
            reason = "says how weights are normalized; set normalize to true"
            refuse_idle("router.weights", self, ("eps", "minimum", "p", "with_shared"), reason)
