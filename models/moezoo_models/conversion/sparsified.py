"""What `moezoo sparsify` made, in figures and in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.selection import Shares

_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Sparsified:
    """A checkpoint that was made selective, as its report in the directory describes it.

    Attributes:
        method: sparsify.
        options: as they were given.
        calibration: the text.
        perplexity: on held-out tokens: ``dense``, ``sparse`` as calibrated in fp32, and
            ``loaded``, of the checkpoint as it was written.
        work: share of the feed-forward products that tokens need, in all.
        read: share of the feed-forward weights that tokens read, in whole rows and columns.
        layers: of each layer, what tokens keep, and its cost to the model if it was measured.
    """

    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    perplexity: dict[str, float]
    work: float
    read: float
    layers: dict[str, dict[str, float]]


def change(options: dict[str, Any], layers: int) -> str:
    """Return a sentence that says what was changed, for a README.

    Args:
        options: as they were given.
        layers: of the model.
    """
    count = next(name for name in ("work", "read") if name in options)
    return (
        "`moezoo sparsify` left the weights as they are, and has tokens skip a part of the dense "
        f"block in {len(options['layers'])} of {layers} layers ({options['method']}, {count} "
        f"{options[count]:g})."
    )


def mean_share(shares: Sequence[float], dense: int) -> float:
    """Return the mean over selective layers' shares and a number of dense layers."""
    return (sum(shares) + dense) / (len(shares) + dense)


def summary(made: Sparsified, target: Path) -> str:
    """Return a few lines: shares of each matrix, and perplexities."""
    kept = [Shares(*(each[name] for name in Shares._fields)) for each in made.layers.values()]
    work = {
        "gate": [each.input for each in kept],
        "up": [each.gate * each.up_input for each in kept],
        "down": [each.hidden for each in kept],
    }
    read = {**work, "up": [each.gate if each.gate < 1 else each.up_input for each in kept]}
    lines = [
        f"to        {target}, {len(kept)} selective blocks",
        f"{'share of':<10}{'gate':>8}{'up':>8}{'down':>8}{'all':>8}",
    ]
    for name, shares, total in (("work", work, made.work), ("read", read, made.read)):
        cells = "".join(f"{sum(shares[m]) / len(kept):>8.3f}" for m in _MATRICES)
        lines.append(f"{name:<10}{cells}{total:>8.3f}")
    for name, what in (("recall", "of needed neurons"), ("energy", "of all neurons'")):
        found = [each[name] for each in made.layers.values() if name in each]
        if found:
            mean, least = sum(found) / len(found), min(found)
            lines.append(f"{name:<10}{mean:.3f} {what}, on tokens held out; least {least:.3f}")
    lines.append(f"perplexity on {made.calibration['held_out_tokens']:,} held-out tokens")
    names = {"dense": "dense", "sparse": "selective", "loaded": "selective, as loaded"}
    dense = made.perplexity["dense"]
    for name, text in names.items():
        if name in made.perplexity:
            value = made.perplexity[name]
            lines.append(f"  {text:<28}{value:>10.4g}  × {value / dense:.3f}")
    return "\n".join(lines)
