"""Batches of conversations, each a pure function of its number.

Shape legend: T tokens in the array, S sequence length, B batch size, W data-parallel processes.

A window has room for S + 1 tokens, of which S are read and S predicted. Conversations are packed
into windows whole, by best fit with the longest first (Johnson 1974), so that few of the places
are left over and no turn loses what it answers. One that is longer than a window is cut into
several, each of which begins with the last token of the one before; only those in which something
is scored are kept. What is packed together is a function of the tokens alone, the order of the
windows of the seed and the epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moezoo.errors import InputError, check_int
from moezoo_train.data.prepared import OPENS, SCORED
from moezoo_train.data.windows import IGNORE_INDEX, Batch, TokenBatches, generator_of


class Piece(NamedTuple):
    """A conversation, or as much of it as fits into a window: tokens [begin, begin + length)."""

    begin: int
    length: int


def pack(marks: NDArray[np.uint8], room: int) -> list[list[Piece]]:
    """Return the pieces of each window.

    Args:
        marks: of all tokens, shape (T,); the first one opens a conversation.
        room: tokens that fit into a window, at least 2.

    Returns:
        The windows, in the order in which they are begun; that of their pieces is arbitrary.
    """
    begins = np.flatnonzero(marks & OPENS)
    lengths = np.diff(begins, append=len(marks))
    pieces: list[Piece] = []
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        if length <= room:
            pieces.append(Piece(begin, length))
            continue
        for first in range(begin, begin + length - 1, room - 1):
            part = min(room, begin + length - first)
            if (marks[first + 1 : first + part] & SCORED).any():
                pieces.append(Piece(first, part))
    return _best_fit(pieces, room)


def _best_fit(pieces: list[Piece], room: int) -> list[list[Piece]]:
    """Put each piece into the fullest window that it fits into, the longest pieces first."""
    windows: list[list[Piece]] = []
    with_left: dict[int, list[int]] = {}
    """Numbers of the windows that have so much room left."""
    left: list[int] = []
    """Its keys, in order."""
    for piece in sorted(pieces, key=lambda piece: (-piece.length, piece.begin)):
        place = bisect_left(left, piece.length)
        if place == len(left):
            number, rest = len(windows), room
            windows.append([])
        else:
            rest = left[place]
            number = with_left[rest].pop()
            if not with_left[rest]:
                del with_left[rest], left[place]
        windows[number].append(piece)
        rest -= piece.length
        if rest not in with_left:
            with_left[rest] = []
            insort(left, rest)
        with_left[rest].append(number)
    return windows


class _Conversations(TokenBatches):
    """Windows of whole conversations; labels are what the assistant says, and -100 elsewhere.

    Places that are left over repeat the window from its beginning, unscored: routers see ordinary
    tokens there, and nothing that is scored comes behind them.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        marks: NDArray[np.uint8],
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokens, sequence_length, batch_size, rank, world_size, vocab_size)
        self.marks = marks
        self.windows = pack(marks, sequence_length + 1)
        self.num_windows = len(self.windows)

    def _batch(self, numbers: list[int]) -> Batch:
        rows = [self._row(self.windows[number]) for number in numbers]
        ids = torch.stack([ids for ids, _ in rows])
        labels = torch.stack([labels for _, labels in rows])
        return {"input_ids": ids[:, :-1].contiguous(), "labels": labels[:, 1:].contiguous()}

    def _row(self, window: list[Piece]) -> tuple[Tensor, Tensor]:
        parts = [slice(piece.begin, piece.begin + piece.length) for piece in window]
        found = self._checked(np.concatenate([self.tokens[part] for part in parts]))
        scored = np.concatenate([self.marks[part] for part in parts]) & SCORED
        # The first token of a piece would be predicted from another conversation.
        scored[np.cumsum([0, *(piece.length for piece in window[:-1])])] = 0
        labels = torch.full((self.sequence_length + 1,), IGNORE_INDEX)
        labels[: len(found)] = found.where(torch.from_numpy(scored) > 0, IGNORE_INDEX)
        return torch.from_numpy(np.resize(found.numpy(), self.sequence_length + 1)), labels


class TrainConversations(_Conversations):
    """Shuffled windows of conversations, in another order in each epoch.

    Windows that do not fill a batch on every process are left out of that epoch. Batch ``i``
    belongs to epoch ``i // len``.

    Args:
        tokens: ids, shape (T,), any integer type; usually mapped into memory.
        marks: what each of them is, shape (T,) uint8.
        sequence_length: S.
        batch_size: B.
        seed: chooses the order.
        rank: number of this process among the W.
        world_size: W.
        vocab_size: bound of the ids.

    Raises:
        InputError: the windows do not fill one batch per process.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        marks: NDArray[np.uint8],
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokens, marks, sequence_length, batch_size, rank, world_size, vocab_size)
        self.seed = check_int("seed", seed, minimum=0)
        if len(self) == 0:
            raise InputError(
                f"batch_size: {batch_size} × {world_size} processes is more than the "
                f"{self.num_windows} windows of {sequence_length} tokens into which the "
                "conversations are packed; lower it"
            )
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Return the number of batches per epoch and process."""
        return self.num_windows // (self.batch_size * self.world_size)

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index`` of the run."""
        return self._batch(self._numbers(index))

    def starts(self, index: int) -> NDArray[Any]:
        """Return where the windows of batch ``index`` begin among the tokens, shape (B,)."""
        return np.array([self.windows[number][0].begin for number in self._numbers(index)])

    def _numbers(self, index: int) -> list[int]:
        epoch, within = divmod(index, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = generator_of(self.seed, epoch)
            self._order = (epoch, torch.randperm(self.num_windows, generator=generator).tolist())
        return self._order[1][self._share(within)]


class ValConversations(_Conversations):
    """All windows of conversations, so that all that the assistant says is predicted exactly once.

    The last batch may hold fewer windows. A process that has no window left for its last batch gets
    one in which nothing is scored.
    """

    def __len__(self) -> int:
        """Return the number of batches per process."""
        return -(-self.num_windows // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index``."""
        numbers = range(self.num_windows)[self._share(index)]
        if numbers:
            return self._batch(list(numbers))
        batch = self._batch([0])
        batch["labels"].fill_(IGNORE_INDEX)
        return batch
