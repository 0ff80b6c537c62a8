"""Feed-forward layers as key-value memories: what triggers a neuron, and what it says.

A neuron's key is matched by the text that gives it the largest coefficients, its *triggers*; its
value v says, through the output embedding E, the tokens ``p = softmax(E v)`` (Geva et al. 2021,
arXiv:2012.14913, sections 3 and 4). A neuron *agrees* when the token that it says is the one that
follows its strongest trigger.

Shapes: N neurons, K triggers kept of each, R tokens of a block, J neurons of a block, V tokens of
the vocabulary, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.analysis.neurons import NeuronBlock

_CELLS = 2**24  # logits computed at once


class TriggerKeeper:
    """The K largest coefficients of every neuron and where in the text they were.

    Memory is ``12 N K`` bytes, whatever the length of the text.

    Args:
        number: neurons N.
        keep: triggers K.

    Attributes:
        coefficients: ``(N, K)`` fp32, descending; minus infinity where there are fewer.
        positions: ``(N, K)`` int64, places in the text; -1 where there are fewer.
    """

    def __init__(self, number: int, keep: int) -> None:
        self.number, self.keep = number, keep
        self.coefficients = torch.full((number, keep), -torch.inf)
        self.positions = torch.full((number, keep), -1, dtype=torch.int64)

    def add(self, blocks: Iterator[NeuronBlock], start: int) -> None:
        """Record a pass whose first token is at place ``start`` of the text."""
        for block in blocks:
            found = (block.activations * block.weights).detach().float().cpu()
            places = block.rows.cpu() + start
            if block.neurons.ndim == 1:
                best = found.topk(min(self.keep, len(found)), dim=0)
                self._merge(block.neurons.cpu(), best.values.t(), places[best.indices].t())
            else:
                self._add_scattered(block.neurons.cpu(), found, places)

    def _add_scattered(self, neurons_RJ: Tensor, found_RJ: Tensor, places_R: Tensor) -> None:
        """Sort by neuron and then by coefficient, and give each neuron its best few."""
        real = neurons_RJ >= 0
        neurons, found = neurons_RJ[real], found_RJ[real]
        places = places_R.unsqueeze(-1).expand_as(neurons_RJ)[real]
        order = found.argsort(descending=True, stable=True)
        order = order[neurons[order].argsort(stable=True)]
        neurons, found, places = neurons[order], found[order], places[order]
        unique, group, size = neurons.unique(return_inverse=True, return_counts=True)
        rank = torch.arange(len(neurons)) - (size.cumsum(0) - size)[group]
        few = rank < self.keep
        best = torch.full((len(unique), self.keep), -torch.inf)
        where = torch.full((len(unique), self.keep), -1, dtype=torch.int64)
        best[group[few], rank[few]] = found[few]
        where[group[few], rank[few]] = places[few]
        self._merge(unique, best, where)

    def _merge(self, neurons_M: Tensor, found_MK: Tensor, places_MK: Tensor) -> None:
        """Keep the best of what is there and what is new."""
        both = torch.cat([self.coefficients[neurons_M], found_MK], dim=-1)
        where = torch.cat([self.positions[neurons_M], places_MK], dim=-1)
        best = both.sort(dim=-1, descending=True, stable=True)
        kept = best.indices[:, : self.keep]
        self.coefficients[neurons_M] = best.values[:, : self.keep]
        self.positions[neurons_M] = where.gather(-1, kept)


@dataclass(frozen=True)
class Sayings:
    """The tokens that the values of M neurons promote.

    Attributes:
        tokens: ``(M, K)`` int64, the tokens of the largest probability, descending.
        probabilities: ``(M, K)`` theirs, softmax over the vocabulary.
        ranks: ``(M,)`` int64, the rank of each neuron's asked token: 0 is the top; -1 where none
            was asked.
        lengths: ``(M,)`` norms of the values.
    """

    tokens: Tensor
    probabilities: Tensor
    ranks: Tensor
    lengths: Tensor


@torch.no_grad()
def sayings(
    values: Callable[[Tensor], Tensor],
    neurons_M: Tensor,
    embedding_VD: Tensor,
    asked_M: Tensor,
    keep: int,
) -> Sayings:
    """Project the values of neurons on the vocabulary, ``softmax(E v)``.

    Args:
        values: gives ``(M, D)`` for neurons ``(M,)``.
        neurons_M: which neurons.
        embedding_VD: output embedding E.
        asked_M: the token whose rank is asked for each neuron; -1 for none.
        keep: tokens given of each.
    """
    parts: list[tuple[Tensor, ...]] = []
    embedding = embedding_VD.float()
    step = max(_CELLS // len(embedding), 1)
    for some, asked in zip(neurons_M.split(step), asked_M.split(step), strict=True):
        value_MD = values(some.to(embedding.device)).float()
        logits_MV = value_MD @ embedding.t()
        best = logits_MV.softmax(dim=-1).topk(min(keep, len(embedding)), dim=-1)
        column = asked.to(embedding.device).clamp(min=0).unsqueeze(-1)
        rank = (logits_MV > logits_MV.gather(-1, column)).sum(dim=-1)
        rank = rank.masked_fill(asked.to(rank.device) < 0, -1)
        parts.append(
            tuple(t.cpu() for t in (best.indices, best.values, rank, value_MD.norm(dim=-1)))
        )
    return Sayings(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Agreement:
    """The agreement of neurons' tokens with what follows their strongest trigger.

    Attributes:
        neurons: neurons that have a trigger with a positive coefficient and a token after it.
        agree: share of them whose top token is the one that follows.
        by_chance: the share that would if each neuron's top token met another's trigger.
        median_rank: of the token that follows, among the vocabulary as the neuron ranks it.
    """

    neurons: int
    agree: float
    by_chance: float
    median_rank: float


def agreement(top_M: Tensor, asked_M: Tensor, ranks_M: Tensor) -> Agreement:
    """Summarise agreement.

    Args:
        top_M: the token that each neuron says most.
        asked_M: the token after its strongest trigger, -1 for none.
        ranks_M: its rank.
    """
    known = asked_M >= 0
    number = int(known.sum())
    if not number:
        return Agreement(0, 0.0, 0.0, 0.0)
    top, asked = top_M[known], asked_M[known]
    size = int(max(top.max(), asked.max())) + 1
    said = top.bincount(minlength=size).double()
    follows = asked.bincount(minlength=size).double()
    chance = float((said * follows).sum()) / number**2
    middle = ranks_M[known].sort().values[(number - 1) // 2]
    return Agreement(number, float((top == asked).double().mean()), chance, float(middle))
