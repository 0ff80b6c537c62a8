"""Batches of streamed texts, in an order that neither workers nor processes change.

Shape legend: S sequence length, B batch size, W data-parallel processes, L readers.

The batches of a run are numbered over all processes: batch m is the (m div L)-th of reader m mod L.
As W times the number of workers divides L, each worker of each process has readers of its own, and
none reads what another does. The windows of a run are numbered too, as in
:mod:`moezoo_train.data.mixing`, which says of which text each is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moezoo.errors import InputError
from moezoo_train.data.mixing import Schedule
from moezoo_train.data.streams.reader import Position, Reader
from moezoo_train.data.streams.source import StreamedText
from moezoo_train.data.windows import Batch

KEPT = 64
"""Batches that are remembered for messages."""

Positions = dict[int, list[Position]]
"""Of each reader that has begun, where it stands in each text."""


class Numbering(NamedTuple):
    """Which batches of a run a process gets.

    Attributes:
        batch_size: B.
        world_size: W.
        rank: which of the processes this is.
        readers: L.
    """

    batch_size: int
    world_size: int
    rank: int
    readers: int

    def check_workers(self, workers: int) -> None:
        """Refuse a number of workers that would share readers.

        Raises:
            InputError: processes times workers do not divide the readers.
        """
        together = self.world_size * max(workers, 1)
        if self.readers % together:
            raise InputError(
                f"stream_readers: {self.readers} is not a multiple of {together}, the "
                f"{self.world_size} processes times their workers (num_workers {workers}); change "
                "num_workers, or begin with other stream_readers"
            )


class Streamed(NamedTuple):
    """A batch on its way from a worker.

    Attributes:
        batch: as a model takes it.
        reader: whose it is.
        positions: where that reader stands behind it, in each text.
        places: of each window, the number of its text and of the part there.
    """

    batch: Batch
    reader: int
    positions: list[Position]
    places: list[tuple[int, int]]


class StreamBatches(IterableDataset[Streamed | str]):
    """The batches of one process from one on, without end; in a worker, those of its readers.

    Args:
        texts: what is streamed.
        weights: of the texts.
        sequence_length: S.
        numbering: which batches this process gets.
        positions: where readers stand.
        first: number of the first batch, over all processes.
    """

    def __init__(
        self,
        texts: Sequence[StreamedText],
        weights: Sequence[float],
        sequence_length: int,
        numbering: Numbering,
        positions: Positions,
        first: int,
    ) -> None:
        self.texts = list(texts)
        self.schedule = Schedule(weights, texts[0].seed)
        self.sequence_length = sequence_length
        self.numbering = numbering
        self.positions = positions
        self.first = first
        self._readers: dict[int, list[Reader]] = {}

    def __iter__(self) -> Iterator[Streamed | str]:
        """Yield batches; what is wrong with the text as a line, which a worker cannot raise."""
        worker = get_worker_info()
        begin, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for number in count(begin, step):
                yield self._batch(
                    self.first + number * self.numbering.world_size + self.numbering.rank
                )
        except InputError as error:
            yield str(error)

    def _batch(self, number: int) -> Streamed:
        size, reader = self.numbering.batch_size, number % self.numbering.readers
        own = self._readers.get(reader) or self._begin(reader)
        rows, places = [], []
        for window in range(number * size, (number + 1) * size):
            text = self.schedule[window][0] if len(own) > 1 else 0
            tokens, part = own[text].next()
            rows.append(tokens)
            places.append((text, part))
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        return Streamed(batch, reader, [each.position for each in own], places)

    def _begin(self, reader: int) -> list[Reader]:
        positions = self.positions.get(reader) or [Position()] * len(self.texts)
        self._readers[reader] = [
            Reader(text, reader, self.sequence_length, position)
            for text, position in zip(self.texts, positions, strict=True)
        ]
        return self._readers[reader]


class Progress:
    """Where readers stand behind the batches that were trained on: fewer than were fetched.

    Args:
        numbering: which batches this process gets.

    Attributes:
        positions: where readers stand.
        moved: those of them that have, in this process.
    """

    def __init__(self, numbering: Numbering) -> None:
        self.numbering = numbering
        self.positions: Positions = {}
        self.moved: set[int] = set()
        self._first = self._since = 0
        self._fetched: deque[tuple[int, Streamed]] = deque()
        self._places: deque[tuple[int, list[tuple[int, int]]]] = deque(maxlen=KEPT)

    def go_on(self, positions: Positions, first: int, since: int) -> None:
        """Begin at a position.

        Args:
            positions: where readers stand.
            first: number of the next batch, over all processes.
            since: batches that this process had trained on by then.
        """
        self.positions, self._first, self._since = positions, first, since
        self._fetched.clear()

    def note(self, number: int, streamed: Streamed) -> None:
        """Remember the ``number``-th batch of this process."""
        self._fetched.append((number, streamed))
        self._places.append((number, streamed.places))

    def settle(self, processed: int) -> int:
        """Take over what was trained on, and return the number of the next batch of the run."""
        while self._fetched and self._fetched[0][0] < processed:
            streamed = self._fetched.popleft()[1]
            self.positions[streamed.reader] = streamed.positions
            self.moved.add(streamed.reader)
        return self._first + (processed - self._since) * self.numbering.world_size

    def restart(self) -> None:
        """Forget what was fetched and not trained on."""
        self._fetched.clear()

    def places(self, number: int) -> list[tuple[int, int]]:
        """Return text and part of each window of a batch; none of one that is long gone."""
        return next((places for found, places in self._places if found == number), [])


class StreamLoader:
    """Streamed batches from the trainer's position on, without end.

    Args:
        open_batches: makes them, given where readers stand and the number of the first.
        progress: is told of what is fetched.
        processed: returns how many this process has trained on.
        options: of torch's loader.
    """

    def __init__(
        self,
        open_batches: Callable[[Positions, int], StreamBatches],
        progress: Progress,
        processed: Callable[[], int],
        options: Mapping[str, Any],
    ) -> None:
        self._open = open_batches
        self._progress = progress
        self._processed = processed
        self._options = options

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches.

        Raises:
            InputError: the text cannot be read or encoded.
        """
        first, next_one = self._processed(), self._progress.settle(self._processed())
        self._progress.restart()
        batches = self._open(dict(self._progress.positions), next_one)
        loader = DataLoader(batches, **self._options, collate_fn=_as_it_is)
        for number, found in enumerate(loader, start=first):
            if isinstance(found, str):
                raise InputError(found)
            self._progress.note(number, found)
            yield found.batch

    def state_dict(self) -> dict[str, int]:
        """Return the position for readers of a checkpoint; it is restored with the data's own."""
        return {"batches_processed": self._processed()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: see :meth:`state_dict`."""


def _as_it_is(item: Any) -> Any:
    return item
