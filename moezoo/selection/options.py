"""The options of :class:`moezoo.SelectiveFFN`'s rules, told apart by ``kind``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moezoo.errors import InputError, check_choice, check_flag, check_int, check_number


@dataclass(frozen=True)
class Thresholds:
    """Values that are small are taken for zero, and what would multiply them is not read.

    The numbers below are where thresholds begin, the same for all entries; ``moezoo sparsify``
    calibrates one for each. With zeros the block computes what the dense one does.

    Attributes:
        kind: ``threshold``.
        input: of ``|x_j|`` that the gate's product reads, or that of an MLP (TEAL, WINA).
        gate: of a neuron's ``|act(gate)|`` (CATS, CHESS); gated blocks only.
        up_input: of ``|x_j|`` that the product with W_up reads; gated blocks only.
        hidden: of the hidden values ``|h_i|`` that the product with W_down reads.
        remainder: rank of factors of each matrix, by which it reads the inputs that are not kept
            (R-Sparse); 0: they are not read.
    """

    kind: Literal["threshold"] = "threshold"
    input: float = 0.0
    gate: float = 0.0
    up_input: float = 0.0
    hidden: float = 0.0
    remainder: int = 0

    def check(self, gated: bool) -> None:
        """Raise :class:`InputError` unless the options are in range and fit the block."""
        check_choice("selection.kind", self.kind, ("threshold",))
        for field in dataclasses.fields(self)[1:5]:
            check_number(f"selection.{field.name}", getattr(self, field.name))
        check_int("selection.remainder", self.remainder, minimum=0)
        for name in ("gate", "up_input"):
            if getattr(self, name) and not gated:
                raise InputError(
                    f"selection.{name}: an MLP has no gate; set selection.input and "
                    "selection.hidden, or gated: true"
                )


EVERYTHING = Thresholds()
"""The default: thresholds of zero."""


@dataclass(frozen=True)
class Predictor:
    """A low-rank map of the input guesses which neurons are needed; only those are computed.

    ``moezoo sparsify`` finds its numbers; without it neurons are chosen at random, by fixed
    directions of the input.

    Attributes:
        kind: ``predictor``.
        top_k: neurons per token; default: half of them.
        rank: of the map; default: a quarter of d_model.
        score: ``logit``, a trained score of each neuron (Deja Vu, Polar Sparsity), or ``gate``, the
            magnitude of the activated gate at low rank times a length of each neuron.
        norm: a layer norm between the two factors (Polar Sparsity).
    """

    kind: Literal["predictor"] = "predictor"
    top_k: int | None = None
    rank: int | None = None
    score: Literal["logit", "gate"] = "logit"
    norm: bool = False

    def check(self, gated: bool) -> None:
        """Raise :class:`InputError` unless the options are in range and fit the block."""
        check_choice("selection.kind", self.kind, ("predictor",))
        check_choice("selection.score", self.score, ("logit", "gate"))
        check_flag("selection.norm", self.norm)

    def sizes(self, d_model: int, d_ff: int) -> tuple[int, int]:
        """Return the rank and the number of neurons per token at a width.

        Raises:
            InputError: they are out of range there.
        """
        rank = max(d_model // 4, 1) if self.rank is None else self.rank
        top_k = max(d_ff // 2, 1) if self.top_k is None else self.top_k
        check_int("selection.rank", rank, maximum=min(d_model, d_ff))
        return rank, check_int("selection.top_k", top_k, maximum=d_ff)


Selection: TypeAlias = Thresholds | Predictor
"""The options of any rule."""
