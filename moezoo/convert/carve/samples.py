"""Calibration tokens of a block: those that are fitted to, those that judge, those kept exact.

Shapes: T tokens, D d_model, F neurons, k tokens that are kept exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block

_MOST_EXACT = 32
"""Tokens kept exact, at most; the first of all texts are mostly one and the same."""


@dataclass(frozen=True)
class Sample:
    """Some tokens.

    Attributes:
        x: ``(T, D)`` inputs.
        hidden: ``(T, F)`` the dense block's activations on them.
        wanted: ``(T, D)`` outputs that are wanted, without the dense block's output bias.
    """

    x: Tensor
    hidden: Tensor
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Samples:
    """The calibration tokens of a block.

    Attributes:
        fitted: what everything is fitted to.
        held_out: what figures are measured on, and strengths chosen.
        exact: tokens outside of every statistic, whose outputs have to stay: the first of a text,
            which may be a thousand times larger than all others, and which all others attend to.
        needed: ``(n,)`` neurons that alone add more to the output of an exact token than the whole
            block does to others'; the largest first.
    """

    fitted: Sample
    held_out: Sample
    exact: Sample
    needed: Tensor

    @property
    def judged(self) -> Sample:
        """The tokens that figures are measured on: where none are held out, the fitted ones."""
        return self.held_out if len(self.held_out) else self.fitted


def split_samples(
    block: Block, x_TD: Tensor, target_TD: Tensor | None, apart_T: Tensor | None, held_out: float
) -> Samples:
    """Compute the activations of calibration tokens, and sort the tokens into what they are for.

    Args:
        block: the dense block.
        x_TD: its inputs.
        target_TD: outputs that are wanted; None for the dense block's.
        apart_T: true at tokens that are kept exact; None for none.
        held_out: share of the others, the last of them, that nothing is fitted to.
    """

    def sample(x: Tensor, target: Tensor | None) -> Sample:
        hidden = block.activations(x)
        if target is None:
            return Sample(x, hidden, hidden @ block.down.t())
        return Sample(x, hidden, target if block.bias_out is None else target - block.bias_out)

    def chosen(tokens: Tensor) -> Sample:
        return sample(x_TD[tokens], None if target_TD is None else target_TD[tokens])

    if apart_T is None:
        apart_T = torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device)
    ordinary, first = (~apart_T).nonzero().flatten(), apart_T.nonzero().flatten()
    count = len(ordinary) - int(len(ordinary) * held_out)
    fitted, judged = chosen(ordinary[:count]), chosen(ordinary[count:])
    exact = chosen(first[:: max(-(-len(first) // _MOST_EXACT), 1)])
    return Samples(fitted, judged, exact, _needed(block, fitted, exact))


def _needed(block: Block, fitted: Sample, exact: Sample) -> Tensor:
    if not len(exact):
        return torch.empty(0, dtype=torch.int64)
    usual = fitted.wanted.norm(dim=1).mean()
    most_F = exact.hidden.abs().amax(dim=0) * block.down.norm(dim=0)
    order = most_F.argsort(descending=True, stable=True)
    return order[: int((most_F > usual).sum())].cpu()


def always_first(order: Tensor, needed: Tensor) -> Tensor:
    """Put some neurons before all others, which keep their order; ``(F,)`` both."""
    needed = needed.to(order.device)
    return torch.cat([needed, order[~torch.isin(order, needed)]])
