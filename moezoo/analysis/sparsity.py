"""Lazy neurons: how few of a layer's neurons a token activates, and how unevenly over neurons.

Li et al. 2022 (arXiv:2210.06313, section 2) count the non-zero entries after the ReLU: few per
token, and a few neurons much more often than others. Activations that are smooth are hardly ever
zero, so three shares are given, all of the layer's N neurons and averaged over tokens:

- *nonzero*: of neurons whose activation a is not zero;
- *strong*: of those with ``|a| > threshold · max |a|``, the maximum over the token's neurons (in
  mixtures, over those of the same expert);
- *effective*: the participation ratio ``(Σ|a|)² / Σ a²``, which is k for k equal activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.analysis.neurons import NeuronBlock
from moezoo.routing.stats import gini


@dataclass(frozen=True)
class Sparsity:
    """The sparsity of one set of neurons; shares are of all N neurons, averaged over tokens.

    Attributes:
        neurons: N.
        tokens: real tokens.
        computed: share that is computed at all, as a router leaves others out.
        nonzero: share whose activation is not zero.
        strong: share above the threshold.
        effective: participation ratio over N, summed over a token's experts.
        dead: share of neurons that were never strong.
        frequency_10: 10 % of the neurons were strong for at most this share of the tokens.
        frequency_50: ... the median neuron.
        frequency_90: ... 90 % of the neurons.
        frequency_most: the busiest neuron's.
        gini: Gini coefficient of how often each neuron was strong; 0 where all were equally often.
    """

    neurons: int
    tokens: int
    computed: float
    nonzero: float
    strong: float
    effective: float
    dead: float
    frequency_10: float
    frequency_50: float
    frequency_90: float
    frequency_most: float
    gini: float


class SparsityCounter:
    """Counts over blocks of activations, added up over passes.

    Args:
        number: neurons N.
        threshold: share of a token's largest activation from which one is strong.

    Attributes:
        nonzero: ``(N,)`` int64, for how many tokens each neuron was not zero.
        strong: ``(N,)`` int64, for how many it was strong.
    """

    def __init__(self, number: int, threshold: float) -> None:
        self.number, self.threshold = number, threshold
        self.nonzero = torch.zeros(number, dtype=torch.int64)
        self.strong = torch.zeros(number, dtype=torch.int64)
        self.tokens = self.computed = 0
        self.effective = 0.0

    def add(self, blocks: Iterator[NeuronBlock], tokens: int) -> None:
        """Count one pass over so many real tokens."""
        self.tokens += tokens
        for block in blocks:
            size = block.activations.detach().abs().float()
            asked = size.numel()
            if block.neurons.ndim == 2:
                size = size.masked_fill(block.neurons < 0, 0.0)
                asked = int((block.neurons >= 0).sum())
            largest = size.amax(dim=-1, keepdim=True)
            self._count(self.nonzero, block, size > 0)
            self._count(self.strong, block, size > self.threshold * largest)
            self.computed += asked
            squares = size.square().sum(dim=-1)
            ratio = size.sum(dim=-1).square() / squares.clamp(min=torch.finfo(squares.dtype).tiny)
            self.effective += float(ratio.double().sum())

    def _count(self, total: Tensor, block: NeuronBlock, marked: Tensor) -> None:
        if block.neurons.ndim == 1:
            total.index_add_(0, block.neurons.cpu(), marked.sum(dim=0).cpu())
        else:
            total += block.neurons[marked].bincount(minlength=self.number).cpu()

    def summary(self) -> Sparsity:
        """Return the shares."""
        cells = max(self.tokens * self.number, 1)
        frequency = self.strong.double() / max(self.tokens, 1)
        # torch.quantile takes no more than 16 M numbers.
        ordered = frequency.sort().values
        tenth, half, most = (ordered[round(q * (self.number - 1))] for q in (0.1, 0.5, 0.9))
        return Sparsity(
            neurons=self.number,
            tokens=self.tokens,
            computed=self.computed / cells,
            nonzero=int(self.nonzero.sum()) / cells,
            strong=int(self.strong.sum()) / cells,
            effective=self.effective / cells,
            dead=float((self.strong == 0).double().mean()),
            frequency_10=float(tenth),
            frequency_50=float(half),
            frequency_90=float(most),
            frequency_most=float(ordered[-1]),
            gini=float(gini(self.strong)),
        )
