"""Batches of several sources, each a pure function of its number.

Shape legend: S sequence length, B batch size, W data-parallel processes, K sources.

The windows of a run are numbered over all processes and batches. Of each 4096 in a row, a source
gets a fixed number, its weight's share; which of them is a random order that follows from the seed
and the number of the 4096. So one computes which source window ``n`` is of, and which one of that
source's it is, without going through those before. A source that is used up begins anew, in the
order of its next epoch, while others are still in their first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moezoo.errors import InputError, check_int, check_number
from moezoo_train.data.packing import TrainConversations
from moezoo_train.data.windows import (
    IGNORE_INDEX,
    Batch,
    TokenBatches,
    TrainBatches,
    generator_of,
)

BLOCK = 4096
"""Windows among which the shares of the sources are exact, to one."""


@dataclass(frozen=True)
class DataSource:
    """One of several texts to train on.

    Args:
        path: text, as `source` of the data, or a directory that `moezoo prepare` left.
        weight: share of the windows that are taken of it, relative to the others' weights.
        text_field: field of a row that holds its text.
        messages_field: field of a row that holds a conversation, which is read instead.
    """

    path: str
    weight: float = 1.0
    text_field: str = "text"
    messages_field: str | None = None


def shares(weights: Sequence[float]) -> list[int]:
    """Return how many of ``BLOCK`` windows each source gets: largest remainders, at least one.

    Raises:
        InputError: a weight is not positive, or too small beside the others.
    """
    for number, weight in enumerate(weights):
        if not check_number(f"sources[{number}].weight", weight):
            raise InputError(f"sources[{number}].weight: 0 takes nothing; leave the source out")
    exact = np.array(weights, np.float64) / np.max(weights)
    exact *= BLOCK / exact.sum()
    if exact[least := int(exact.argmin())] < 0.5:
        raise InputError(
            f"sources[{least}].weight: {weights[least]:g} is less than one window in "
            f"{2 * BLOCK}; raise it, or leave the source out"
        )
    counts = np.floor(exact).astype(np.int64)
    missing = BLOCK - int(counts.sum())
    for number in np.argsort(counts - exact, kind="stable")[:missing]:
        counts[number] += 1
    while (empty := np.flatnonzero(counts == 0)).size:
        counts[counts.argmax()] -= 1
        counts[empty[0]] += 1
    return [int(count) for count in counts]


class Schedule:
    """Which window of which source each window of a run is.

    Args:
        weights: of the K sources.
        seed: chooses the order.

    Raises:
        InputError: a weight is out of range.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = np.array(shares(weights))
        self.seed = check_int("seed", seed, minimum=0)
        self._labels = np.repeat(np.arange(len(self.counts)), self.counts)
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return the source of window ``number``, and which of that source's windows it is."""
        block, place = divmod(number, BLOCK)
        sources, within = self._of_block(block)
        source = int(sources[place])
        return source, block * int(self.counts[source]) + int(within[place])

    def taken(self, windows: int) -> list[int]:
        """Return how many of the first ``windows`` are of each source."""
        block, place = divmod(windows, BLOCK)
        sources, _ = self._of_block(block)
        begun = np.bincount(sources[:place], minlength=len(self.counts))
        return [int(count) for count in block * self.counts + begun]

    def _of_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._block is None or self._block[0] != block:
            # A third number, so that no epoch of a source has the same order.
            generator = generator_of(self.seed, block, BLOCK)
            sources = self._labels[torch.randperm(BLOCK, generator=generator).numpy()]
            within = np.zeros(BLOCK, np.int64)
            for source, count in enumerate(self.counts):
                within[sources == source] = np.arange(count)
            self._block = (block, sources, within)
        return self._block[1:]


class MixedBatches(TokenBatches):
    """Training windows of several sources.

    Args:
        sources: batches of one window for one process, of each source; all of the same length S.
        weights: of the sources.
        batch_size: B.
        seed: chooses the order of the sources.
        rank: number of this process among the W.
        world_size: W.

    Raises:
        InputError: a weight is out of range, or all windows do not fill one batch per process.
    """

    def __init__(
        self,
        sources: Sequence[TrainBatches | TrainConversations],
        weights: Sequence[float],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            np.zeros(0, np.int64), sources[0].sequence_length, batch_size, rank, world_size
        )
        self.sources = list(sources)
        self.schedule = Schedule(weights, seed)
        if len(self) == 0:
            raise InputError(
                f"batch_size: {batch_size} × {world_size} processes is more than the "
                f"{sum(map(len, self.sources))} windows in all sources; lower it"
            )

    def __len__(self) -> int:
        """Return the number of batches with as many windows as all sources have."""
        return sum(map(len, self.sources)) // (self.batch_size * self.world_size)

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index`` of the run."""
        rows = [self.sources[source][number] for source, number in self.windows(index)]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def windows(self, index: int) -> list[tuple[int, int]]:
        """Return, of batch ``index``, the source of each window and its number there."""
        share = self._share(index)
        return [self.schedule[number] for number in range(share.start, share.stop)]


class JoinedBatches(TokenBatches):
    """Validation windows of several sources, one source behind the other, each window once.

    Args:
        sources: validation batches of one window for one process, of each source.
        batch_size: B.
        rank: number of this process among the W.
        world_size: W.
    """

    def __init__(
        self, sources: Sequence[TokenBatches], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(
            np.zeros(0, np.int64), sources[0].sequence_length, batch_size, rank, world_size
        )
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        """Return the number of batches per process."""
        return -(-int(self._ends[-1]) // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index``; a process without windows gets one where nothing is scored."""
        numbers = range(int(self._ends[-1]))[self._share(index)]
        rows = [self._window(number) for number in numbers or [0]]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if not numbers:
            batch["labels"].fill_(IGNORE_INDEX)
        return batch

    def _window(self, number: int) -> Batch:
        source = int(np.searchsorted(self._ends, number, side="right"))
        return self.sources[source][number - int(self._ends[source]) + len(self.sources[source])]
