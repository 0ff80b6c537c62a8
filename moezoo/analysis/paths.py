"""Paths between layers: which slot of one layer a token goes to after which of the layer before.

A token's slot in a layer is the one that weighs most. Two layers share the information of the table
of how often slot a is followed by slot b; see :mod:`moezoo.analysis.specialization`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from moezoo.analysis.specialization import count_pairs

_MOST_CELLS = 2**22
"""Pairs of layers with more pairs of slots than this get no table."""

_MOST_PATHS = 2**20
"""Different paths that are kept; beyond it, the rarer half of those seen is forgotten."""


class Paths:
    """Counts of the ways that tokens take, added up over passes.

    Attributes:
        tables: ``(N_a, N_b)`` int64 counts by the names of two layers that follow each other.
        ways: how often each way through all layers was taken, one slot per layer.
        forgotten: tokens whose way is not in ``ways`` because it was rare.
    """

    def __init__(self, num_slots: Mapping[str, int], most_paths: int = _MOST_PATHS) -> None:
        self.names = list(num_slots)
        self.most_paths = most_paths
        sizes = list(num_slots.values())
        self.tables: dict[tuple[str, str], Tensor] = {}
        for a, b, rows, columns in zip(self.names, self.names[1:], sizes, sizes[1:], strict=False):
            if rows * columns <= _MOST_CELLS:
                self.tables[a, b] = torch.zeros(rows, columns, dtype=torch.int64)
        self.ways: Counter[tuple[int, ...]] = Counter()
        self.forgotten = 0

    def add(self, slots: Mapping[str, Tensor]) -> None:
        """Count the slots ``(T,)`` of the same tokens in each layer; -1 is none."""
        for (a, b), table in self.tables.items():
            both = (slots[a] >= 0) & (slots[b] >= 0)
            count_pairs(table, slots[a][both], slots[b][both].unsqueeze(-1))
        if len(self.names) > 1:
            way_TL = torch.stack([slots[name] for name in self.names], dim=-1)
            whole_TL = way_TL[(way_TL >= 0).all(dim=-1)]
            self.ways.update(map(tuple, whole_TL.tolist()))
            self._forget()

    def _forget(self) -> None:
        if len(self.ways) > self.most_paths:
            kept = Counter(dict(self.ways.most_common(self.most_paths // 2)))
            self.forgotten += self.ways.total() - kept.total()
            self.ways = kept
