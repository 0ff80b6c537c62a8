"""How much of a block is computed, and how much of it is read, by the shares that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from moezoo.errors import InputError
from moezoo.selection import Shares

SelectMethod = Literal["mix", "cats", "chess", "teal", "wina"]
METHODS: tuple[str, ...] = get_args(SelectMethod)

Count = Literal["work", "read"]
COUNTS: dict[Count, Callable[[Shares], float]]


def work_share(kept: Shares) -> float:
    """Return the share of a gated block's products that are needed.

    W_gate needs a row of products per kept input, W_up a product per kept neuron and kept input,
    W_down one per kept hidden value.
    """
    return (kept.input + kept.gate * kept.up_input + kept.hidden) / 3


def read_share(kept: Shares) -> float:
    """Return the share of a gated block's weights that are read, in whole rows and columns.

    Of W_up those are the rows of kept neurons, or where all neurons are kept, the columns of kept
    inputs: memory is read in lines, and a row with gaps costs as much as a whole one.
    """
    up = kept.gate if kept.gate < 1 else kept.up_input
    return (kept.input + up + kept.hidden) / 3


COUNTS = {"work": work_share, "read": read_share}


def uniform(method: SelectMethod, share: float) -> Shares:
    """Return what a method keeps of every layer for a share of the work.

    Args:
        method: cats and chess choose neurons by their gate, which is computed whole:
            ``(1 + 2 a) / 3`` of the work for a share a. teal and wina keep the same share of what
            each matrix multiplies. mix has no such rule: :func:`moezoo.convert.select.allocate`.
        share: of the work, which for these methods is that of the weights read too.

    Raises:
        InputError: the method cannot do with so little.
    """
    if method in ("cats", "chess"):
        kept = (3 * share - 1) / 2
        if kept < 0.02:
            raise InputError(
                f"work: {method} computes the whole gate, a third of the block, and {share:g} "
                "leaves nothing for the rest; give 0.35 or more, or method: mix"
            )
        return Shares(gate=kept, hidden=kept)
    return Shares(share, 1.0, share, share)
