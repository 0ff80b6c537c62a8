"""How often a batch reads each row of a model's tables: values of memories, experts of PEER."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moezoo.experts.rank_one import RankOneExperts
from moezoo.experts.values import ValueTable
from moezoo.routing.stats import expert_counts

Table = ValueTable | RankOneExperts


def memory_tables(model: nn.Module) -> dict[str, Table]:
    """Find the tables that are read row by row, each once, by their names in the model."""
    return {
        name: m for name, m in model.named_modules() if isinstance(m, ValueTable | RankOneExperts)
    }


def num_rows(table: Table) -> int:
    """Return the number of a table's rows N."""
    return table.num_slots if isinstance(table, ValueTable) else table.num_experts


class SlotCounter:
    """Counts how often scored positions read each row; layers that share a table add up.

    Args:
        tables: the tables to count reads of, by name.

    Attributes:
        counts: ``(N,)`` int64 by table, since the last :meth:`reset`.
    """

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self.tables = dict(tables)
        self.counts: dict[str, Tensor] = {}
        self._scored_T: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self.reset()

    def reset(self) -> None:
        """Begin again with zeros."""
        self.counts = {
            name: torch.zeros(num_rows(t), dtype=torch.int64, device=next(t.parameters()).device)
            for name, t in self.tables.items()
        }

    def attach(self) -> None:
        """Listen to the tables; nothing is counted before :meth:`start`."""
        self._hooks = [
            table.register_forward_pre_hook(self._listener(name))
            for name, table in self.tables.items()
        ]

    def detach(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def start(self, scored: Tensor) -> None:
        """Count from now on.

        Args:
            scored: bool, true at the positions that count, in the shape of the batch.
        """
        self._scored_T = scored.flatten()

    def pause(self) -> None:
        """Count nothing: not what recomputation under activation checkpointing reads again."""
        self._scored_T = None

    def _listener(self, name: str) -> Any:
        def count(table: nn.Module, args: tuple[Any, ...]) -> None:
            if self._scored_T is None:
                return
            indices_TK, mask_T = (
                (args[0], args[2]) if isinstance(table, ValueTable) else (args[1], None)
            )
            counted_T = self._scored_T if mask_T is None else self._scored_T & mask_T
            indices_TK = indices_TK.masked_fill(~counted_T.unsqueeze(-1), -1)
            found = expert_counts(indices_TK, len(self.counts[name]))
            self.counts[name] += found.to(self.counts[name].device)  # of a table in main memory

        return count
