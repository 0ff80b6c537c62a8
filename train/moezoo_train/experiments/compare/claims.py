"""Papers' claims about a comparison's rows, judged by its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from moezoo.command.tables import markdown_lines
from moezoo_train.experiments.common.statistics import Mean, Verdict, confidence, mean
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.settings import MEASURES, Claim

COLUMNS = ("claim", "paper", "verdict", "compared", "measure", ">difference", ">95 % interval")
HOW = (
    "A difference is the mean over seeds of the right row's measure less the left one's; a "
    "claim holds if the 95 % interval of each (Student's t, paired by seed) lies above zero, "
    "fails if one lies below, and is undecided else."
)
"""How claims are judged, for readers of their table."""


@dataclass(frozen=True)
class Contest:
    """Two rows, of which the first is claimed to have the lower measure.

    Attributes:
        lower: name of that row.
        higher: name of the other.
        gain: the other's measure less its own, paired by seed; None if no seed has both.
    """

    lower: str
    higher: str
    gain: Mean | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean difference lies with 95 % confidence; None for fewer than two seeds."""
        return None if self.gain is None else confidence(self.gain)

    @property
    def verdict(self) -> Verdict:
        """Undecided unless zero is outside of the interval."""
        if self.interval is None or not all(map(math.isfinite, self.interval)):
            return "undecided"
        low, high = self.interval
        return "holds" if low > 0 else "fails" if high < 0 else "undecided"


@dataclass(frozen=True)
class Judged:
    """A claim beside what was measured.

    Attributes:
        name: of the claim.
        claim: itself.
        contests: between each row of a place and each of the next.
    """

    name: str
    claim: Claim
    contests: tuple[Contest, ...]

    @property
    def verdict(self) -> Verdict:
        """Holds if every contest does; fails if one does."""
        verdicts = {contest.verdict for contest in self.contests}
        if "fails" in verdicts:
            return "fails"
        return "undecided" if "undecided" in verdicts else "holds"


def parse_claims(whole: Mapping[str, Any]) -> dict[str, Claim]:
    """Read the claims of ``results.json``."""
    claims = whole["experiment"].get("claims") or {}
    return {name: Claim(**options) for name, options in claims.items()}


def judge(claims: Mapping[str, Claim], results: Iterable[RunResult]) -> list[Judged]:
    """Measure what each claim says, paired by seed.

    Args:
        claims: by name.
        results: of a comparison's runs; failed ones and random routing do not count.
    """
    found = {result.run: result for result in results if result.failure is None}

    def values(row: str, measure: str) -> dict[str, float]:
        seeds = {run.removeprefix(f"{row}-"): result for run, result in found.items()}
        known = {seed: getattr(r, MEASURES[measure]) for seed, r in seeds.items() if seed.isdigit()}
        return {seed: value for seed, value in known.items() if value is not None}

    def contest(lower: str, higher: str, measure: str) -> Contest:
        ours, theirs = values(lower, measure), values(higher, measure)
        both = sorted(ours.keys() & theirs.keys())
        return Contest(lower, higher, mean([theirs[seed] - ours[seed] for seed in both]))

    return [
        Judged(
            name,
            claim,
            tuple(
                contest(lower, higher, claim.measure)
                for place, following in pairwise(claim.places)
                for lower, higher in product(place, following)
            ),
        )
        for name, claim in claims.items()
    ]


def cells_of(one: Judged) -> list[list[str]]:
    """Return a line of text per contest, below :data:`COLUMNS`; the claim is in the first only."""
    first = [one.claim.says, one.claim.paper, one.verdict]
    return [
        [
            *(first if number == 0 else [""] * 3),
            f"{contest.lower} < {contest.higher}",
            one.claim.measure,
            _difference(contest),
            _interval(contest),
        ]
        for number, contest in enumerate(one.contests)
    ]


def markdown(title: str, judged: Sequence[Judged], notes: Iterable[str]) -> str:
    """Write what became of the claims in Markdown."""
    lines = []
    for one in judged:
        for says, paper, verdict, *rest in cells_of(one):
            lines.append([says, paper, f"**{verdict}**" if verdict else "", *rest])
    table = "\n".join(markdown_lines(COLUMNS, lines))
    return "\n\n".join([f"# {title}", table, f"{HOW}\n", *notes])


def _difference(contest: Contest) -> str:
    return "–" if contest.gain is None else f"{contest.gain.value:+.3f}".replace("-", "−")


def _interval(contest: Contest) -> str:
    if contest.interval is None:
        return "–"
    return " to ".join(f"{end:+.3f}" for end in contest.interval).replace("-", "−")
