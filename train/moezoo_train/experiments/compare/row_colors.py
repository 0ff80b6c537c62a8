"""Colours that the colour-blind can tell apart: one per method or, for many, per family."""

from __future__ import annotations

from collections.abc import Sequence

from moezoo_train.experiments.common.palette import (
    BLUE,
    GREEN,
    GREY,
    INDIGO,
    OCHRE,
    PINK,
    RED,
    SKY,
)
from moezoo_train.experiments.compare.results import Row

FAMILIES = {
    "dense": INDIGO,
    "experts": BLUE,
    "hashed experts": GREEN,
    "memories": RED,
    "trees": PINK,
    "strongest neurons": OCHRE,
    "other": SKY,
}
_FAMILY_OF = {
    "DenseFFN": "dense",
    "SparseMoE": "experts",
    "SigmaMoE": "experts",
    "CarvedMoE": "experts",
    "HashLayer": "hashed experts",
    "Finedeep": "dense",
    "PEER": "memories",
    "ProductKeyMemory": "memories",
    "MemoryPlus": "memories",
    "FastFeedForward": "trees",
    "UltraFastFFF": "trees",
    "TopKFFN": "strongest neurons",
    "SelectiveFFN": "strongest neurons",
}
_OWN = (BLUE, RED, GREEN, PINK, OCHRE, SKY, INDIGO)


def family(row: Row) -> str:
    """Name the kind of a row's layer."""
    return _FAMILY_OF.get(row.layer, "other")


def colors(rows: Sequence[Row], baseline: str) -> dict[str, str]:
    """Return a colour for every row: its own while there are enough of them, else its family's.

    Args:
        rows: of a comparison.
        baseline: name of the row that is grey.
    """
    others = sorted(row.name for row in rows if row.name != baseline)
    if len(others) <= len(_OWN):
        found = dict(zip(others, _OWN, strict=False))
        return {row.name: found.get(row.name, GREY) for row in rows}
    return {row.name: GREY if row.name == baseline else FAMILIES[family(row)] for row in rows}


def families(rows: Sequence[Row], shown: Sequence[Row], baseline: str) -> dict[str, str]:
    """Return the colour of every family that is shown, where colours are of families; else none.

    Args:
        rows: of a comparison, which decide that.
        shown: those of them that are in the picture.
        baseline: name of the row that is grey.
    """
    if len([row for row in rows if row.name != baseline]) <= len(_OWN):
        return {}
    found = {family(row) for row in shown if row.name != baseline}
    named = {name: color for name, color in FAMILIES.items() if name in found}
    there = any(row.name == baseline for row in shown)
    return named | ({f"{baseline}, the baseline": GREY} if there else {})
