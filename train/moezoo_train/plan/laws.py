"""Scaling laws: the loss of N parameters that were trained on D tokens, sparse ones too.

- *average* (Jin et al. 2025, arXiv:2501.12486): ``L = E + A / N^α + B / D^β``, N the mean over
  training of parameters that are not zero. For dense models that is Chinchilla's law (Hoffmann et
  al. 2022, arXiv:2203.15556, section 3.3).
- *sparse* (Frantar et al. 2023, arXiv:2309.08520): ``L = (a_S (1 - S)^b_S + c_S) N^-b_N +
  (a_D / D)^b_D + c``, N the parameters that are not zero at the end, S the share of zeros then.

The two N differ by much: pruned along a cubic curve from a quarter to three quarters of a run to
S = 0.75, a model has a mean of 0.53 of its parameters and ends with 0.25. So each is a type of its
own, and a law refuses the other's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

from moezoo.errors import InputError, check_choice, check_number


@dataclass(frozen=True)
class MeanCount:
    """The mean over training of parameters that are not zero.

    Attributes:
        value: how many.
    """

    value: float


@dataclass(frozen=True)
class FinalCount:
    """The parameters that are not zero at the end of training.

    Attributes:
        value: how many.
        sparsity: S, the share of zeros among all of them.
    """

    value: float
    sparsity: float = 0.0


@dataclass(frozen=True)
class AverageLaw:
    """``L = E + A / N^α + B / D^β``, N a mean over training.

    Attributes:
        E: loss that no model goes below, in nats per token.
        A: of the parameters' term.
        alpha: its exponent.
        B: of the tokens' term.
        beta: its exponent.
    """

    name: ClassVar[str] = "average"
    form: ClassVar[str] = "L = E + A / N^alpha + B / D^beta, N the mean over training"

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, count: MeanCount, tokens: float) -> float:
        """Return the loss in nats per token.

        Args:
            count: N.
            tokens: D.

        Raises:
            TypeError: N is another law's.
        """
        if not isinstance(count, MeanCount):
            raise TypeError("the average law wants a MeanCount: its N is a mean over training")
        return self.E + self.A / count.value**self.alpha + self.B / tokens**self.beta


@dataclass(frozen=True)
class SparseLaw:
    """``L = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c``, N at the end.

    Attributes:
        a_S: of what sparsity takes off the parameters' term.
        b_S: its exponent.
        c_S: of what stays at any sparsity.
        b_N: exponent of the parameters' term.
        a_D: of the tokens' term.
        b_D: its exponent.
        c: loss that no model goes below.
    """

    name: ClassVar[str] = "sparse"
    form: ClassVar[str] = (
        "L = (a_S (1 - S)^b_S + c_S) / N^b_N + (a_D / D)^b_D + c, N what is left at the end"
    )

    a_S: float
    b_S: float
    c_S: float
    b_N: float
    a_D: float
    b_D: float
    c: float

    def loss(self, count: FinalCount, tokens: float) -> float:
        """Return the loss in nats per token.

        Args:
            count: N and S.
            tokens: D.

        Raises:
            TypeError: N is another law's.
        """
        if not isinstance(count, FinalCount):
            raise TypeError("the sparse law wants a FinalCount: its N is what is left at the end")
        factor = self.a_S * (1.0 - count.sparsity) ** self.b_S + self.c_S
        return factor / count.value**self.b_N + (self.a_D / tokens) ** self.b_D + self.c

    def dense(self) -> AverageLaw:
        """Return Chinchilla's law that it is for S = 0, where both N are one."""
        return AverageLaw(
            E=self.c, A=self.a_S + self.c_S, alpha=self.b_N, B=self.a_D**self.b_D, beta=self.b_D
        )


Law: TypeAlias = AverageLaw | SparseLaw
LAWS: dict[str, type[AverageLaw] | type[SparseLaw]] = {
    law.name: law for law in (AverageLaw, SparseLaw)
}


class Published(NamedTuple):
    """A law as a paper gives it; never fitted here, and of other text and another tokenizer."""

    law: Law
    source: str


PUBLISHED = (
    Published(
        AverageLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28),
        "Chinchilla, dense: arXiv:2203.15556",
    ),
    Published(
        SparseLaw(a_S=16.8, b_S=0.722, c_S=45.0, b_N=0.245, a_D=6.90e8, b_D=0.203, c=0.651),
        "T5 on C4, sparse: arXiv:2309.08520",
    ),
)


@dataclass(frozen=True)
class Reach:
    """What the runs span that a law was fitted to.

    Attributes:
        parameters: least and most N, of the law's own kind.
        tokens: least and most D.
        sparsity: least and most S.
    """

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    sparsity: tuple[float, float] = (0.0, 0.0)

    def holds(self, count: MeanCount | FinalCount, tokens: float) -> bool:
        """Return whether a run lies within; beyond, a law is a guess."""
        pairs = [(count.value, self.parameters), (tokens, self.tokens)]
        if isinstance(count, FinalCount):
            pairs.append((count.sparsity, self.sparsity))
        return all(low <= value <= high for value, (low, high) in pairs)


def as_json(law: Law, reach: Reach) -> dict[str, Any]:
    """Return a law as :func:`read_law` reads it."""
    return {"law": law.name, "coefficients": asdict(law), "reach": asdict(reach)}


def read_law(key: str, values: Any) -> tuple[Law, Reach]:
    """Read what :func:`as_json` returned.

    Args:
        key: what messages call it.
        values: as JSON has it.

    Raises:
        InputError: it is no such law.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{key}: it is no fitted law; make one by moezoo compare RUNS --law all")
    cls = LAWS[check_choice(key, values.get("law"), LAWS)]
    found = values.get("coefficients")
    names = [field.name for field in fields(cls)]
    if not isinstance(found, Mapping) or set(found) != set(names):
        raise InputError(f"{key}: a {cls.name} law has {', '.join(names)}; fit it again")
    law = cls(**{name: check_number(f"{key}.{name}", found[name]) for name in names})
    spans = values.get("reach")
    if not isinstance(spans, Mapping):
        raise InputError(f"{key}.reach: is missing; fit the law again")
    return law, Reach(
        *(_span(f"{key}.reach.{field.name}", spans.get(field.name)) for field in fields(Reach))
    )


def _span(key: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{key}: {value!r} is not two numbers; fit the law again")
    return check_number(key, value[0]), check_number(key, value[1])


def read_laws(path: str) -> list[tuple[Law, Reach]]:
    """Read the laws that ``moezoo compare RUNS --law`` has written to ``laws.json``.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"law: {path} cannot be read as laws; make it by moezoo compare RUNS --law all"
        ) from error
    if not isinstance(values, list) or not values:
        raise InputError(f"law: {path} holds no laws; make it by moezoo compare RUNS --law all")
    return [read_law("law", one) for one in values]
