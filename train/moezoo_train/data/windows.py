"""Batches cut from one long array of tokens, each a pure function of its number.

Shape legend: T tokens in the array, S sequence length, B batch size, W data-parallel processes.

Nothing here keeps a position. Batch ``i`` of a run is ``TrainBatches(...)[i]``, whether the run was
interrupted before or not, and however many workers read ahead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from moezoo.errors import InputError, check_int

IGNORE_INDEX = -100
"""Label of a position that is not scored."""

Batch = dict[str, Tensor]
_MAPPED = {"tokens", "marks"}
"""Attributes that may be mapped files."""


class TokenBatches(Dataset[Batch]):
    """Base of training and validation batches.

    Args:
        tokens: ids, shape (T,), any integer type; usually mapped into memory.
        sequence_length: S, tokens per window.
        batch_size: B, windows per batch and process.
        rank: number of this process among the W.
        world_size: W, processes that share the data.
        vocab_size: size of the model's vocabulary, which every id has to be below.

    Raises:
        InputError: a size is not positive, or there are fewer tokens than one window takes.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.sequence_length = check_int("sequence_length", sequence_length)
        self.batch_size = check_int("batch_size", batch_size)
        self.rank = rank
        self.world_size = world_size
        self.vocab_size = vocab_size

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches that go once through the data."""

    @abstractmethod
    def __getitem__(self, index: int) -> Batch:
        """Return ``{"input_ids": (B, S), "labels": (B, S)}``, int64; labels are next tokens."""

    def __getstate__(self) -> dict[str, Any]:
        """Send a worker process the names of mapped files, not their content."""
        state = self.__dict__.copy()
        for name in _MAPPED & set(state):
            if isinstance(array := state[name], np.memmap):
                state[name] = (array.filename, array.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _MAPPED & set(state):
            if isinstance(state[name], tuple):
                filename, dtype = state[name]
                setattr(self, name, np.memmap(filename, dtype=dtype, mode="r"))

    def _share(self, index: int) -> slice:
        """Return which of the windows in order are this process's ``index``-th batch."""
        first = (index * self.world_size + self.rank) * self.batch_size
        return slice(first, first + self.batch_size)

    def _checked(self, rows: NDArray[Any]) -> Tensor:
        ids = torch.from_numpy(rows.astype(np.int64))
        largest = int(ids.max())
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise InputError(
                f"vocab_size: the tokens hold id {largest}, but the vocabulary has "
                f"{self.vocab_size} ids; use the tokenizer the tokens were made with"
            )
        return ids


class TrainBatches(TokenBatches):
    """Shuffled windows.

    Each epoch cuts the tokens at another offset and shuffles the windows; both follow from the seed
    and the epoch. Windows that do not fill a batch on every process are left out of that epoch.
    Indexing goes on beyond ``len``: batch ``i`` belongs to epoch ``i // len``.

    Args:
        tokens: see :class:`TokenBatches`, as for the other sizes.
        sequence_length: S.
        batch_size: B.
        seed: chooses offsets and order.
        rank: number of this process.
        world_size: W.
        vocab_size: bound of the ids.

    Raises:
        InputError: the tokens do not fill one batch per process.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokens, sequence_length, batch_size, rank, world_size, vocab_size)
        self.seed = check_int("seed", seed, minimum=0)
        if len(tokens) <= sequence_length:
            raise InputError(
                f"sequence_length: {sequence_length} needs more than {sequence_length} training "
                f"tokens, but there are {len(tokens)}; lower it or give more text"
            )
        # One window fewer than would fit leaves room for any offset below S.
        self.num_windows = max(1, len(tokens) // sequence_length - 1)
        if len(self) == 0:
            raise InputError(
                f"batch_size: {batch_size} × {world_size} processes is more than the "
                f"{self.num_windows} windows of {sequence_length} tokens in the data; lower it"
            )
        self._epoch: tuple[int, int, NDArray[Any]] | None = None

    def __len__(self) -> int:
        """Return the number of batches per epoch and process."""
        return self.num_windows // (self.batch_size * self.world_size)

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index`` of the run."""
        rows = self.tokens[
            self.starts(index)[:, None] + np.arange(self.sequence_length + 1)
        ]  # (B, S + 1)
        ids = self._checked(rows)
        return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def starts(self, index: int) -> NDArray[Any]:
        """Return where the windows of batch ``index`` begin among the tokens, shape (B,)."""
        epoch, within = divmod(index, len(self))
        offset, order = self._shuffle(epoch)
        return offset + self.sequence_length * order[self._share(within)]

    def _shuffle(self, epoch: int) -> tuple[int, NDArray[Any]]:
        """Return the offset and the order of the windows, kept for the epoch they belong to."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = generator_of(self.seed, epoch)
            spare = len(self.tokens) - 1 - self.num_windows * self.sequence_length
            offsets = min(self.sequence_length, spare + 1)
            offset = int(torch.randint(offsets, (), generator=generator))
            order = torch.randperm(self.num_windows, generator=generator).numpy()
            self._epoch = (epoch, offset, order)
        return self._epoch[1:]


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator of random numbers that are a function of some integers."""
    text = " ".join(map(str, numbers))
    digest = blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class ValBatches(TokenBatches):
    """All consecutive windows, so that every token but the first is predicted exactly once.

    The end of the last window is filled with ``pad_id`` and the label -100. The last batch may hold
    fewer windows. Every process gets the same number of batches; one that has no window left for
    its last gets one in which nothing is scored.

    Args:
        tokens: see :class:`TokenBatches`, as for the other sizes.
        sequence_length: S.
        batch_size: B.
        pad_id: a valid id.
        rank: number of this process.
        world_size: W.
        vocab_size: bound of the ids.

    Raises:
        InputError: there are fewer than two tokens.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        sequence_length: int,
        batch_size: int,
        pad_id: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokens, sequence_length, batch_size, rank, world_size, vocab_size)
        if len(tokens) < 2:
            raise InputError(
                f"val_fraction: validation needs two tokens, but there are {len(tokens)}; raise it"
            )
        self.pad_id = pad_id
        self.num_windows = -(-(len(tokens) - 1) // sequence_length)

    def __len__(self) -> int:
        """Return the number of batches per process."""
        return -(-self.num_windows // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        """Return batch ``index``."""
        windows = range(self.num_windows)[self._share(index)]
        shape = (max(1, len(windows)), self.sequence_length)
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, window in enumerate(windows):
            first = window * self.sequence_length
            ids = self._checked(self.tokens[first : first + self.sequence_length + 1])
            input_ids[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = ids[1:]
        return {"input_ids": input_ids, "labels": labels}


class BatchNumbers(DistributedSampler[Batch]):
    """Counts batches, from wherever the run stands.

    It is a ``DistributedSampler`` because that is what it is, as the batches are this process's
    share already, and Lightning leaves such a sampler alone where it would shuffle any other.

    Args:
        batches: the batches to number.
        first: called at the beginning of each pass; returns the number to start from.
    """

    def __init__(self, batches: TokenBatches, first: Callable[[], int] = lambda: 0) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self._length = len(batches)
        self._first = first

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        """Yield as many numbers as there are batches."""
        first = self._first()
        return iter(range(first, first + self._length))

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return self._length
