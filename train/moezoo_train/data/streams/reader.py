"""A reader: the windows of its share of a text, from any position on.

Shape legend: S sequence length.

A reader goes through its parts block by block. The tokens of a block, behind those that the block
before has left over, are cut into windows, and these are shuffled. So a position is the number of
the block, how many of its windows are taken, and what was left over before it: from there the
windows that follow are a function of the text alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_train.checkpoint_structure import is_whole
from moezoo_train.data.streams.source import BLOCK_PARTS, StreamedText
from moezoo_train.data.windows import generator_of


@dataclass(frozen=True)
class Position:
    """Where a reader stands.

    Attributes:
        epoch: times that it has gone through its parts.
        block: blocks that it has finished in this epoch.
        window: windows that are taken of the block that it is in.
        carry: ids that the block before has left over, ``(tokens,)``.
    """

    epoch: int = 0
    block: int = 0
    window: int = 0
    carry: NDArray[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        carry = np.zeros(0, np.int64) if self.carry is None else self.carry.astype(np.int64)
        counts = {"epoch": self.epoch, "block": self.block, "window": self.window}
        return {**counts, "carry": torch.from_numpy(carry)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """Return what :meth:`state_dict` described.

        Raises:
            KeyError: something is missing, or (AttributeError, TypeError, ValueError) of another
                kind.
        """
        epoch, block, window = (state[name] for name in ("epoch", "block", "window"))
        carry = state["carry"].numpy().copy()
        counts = map(is_whole, (epoch, block, window))
        if not all(counts) or carry.dtype != np.int64 or carry.ndim != 1:
            raise ValueError("a position is something else")
        return cls(epoch, block, window, carry)


class Reader:
    """The windows of one reader's share of a text.

    Args:
        text: the text.
        number: which of its readers this is.
        sequence_length: S; a window has one token more, which is the next one's first.
        position: where to begin.
    """

    def __init__(
        self, text: StreamedText, number: int, sequence_length: int, position: Position
    ) -> None:
        self.text = text
        self.number = number
        self.sequence_length = sequence_length
        self.position = position
        self._block: _Block | None = None

    def next(self) -> tuple[NDArray[Any], int]:
        """Return the next window's ids, ``(S + 1,)``, and the number of the part it begins in.

        Raises:
            InputError: a part cannot be read; or the reader has too little text for one window.
        """
        empty = 0
        block = self._block or self._load()
        while self.position.window >= len(block.order):
            empty += not len(block.order)
            self.position = self._behind(block)
            if empty > 2 * block.count:
                raise InputError(
                    f"stream_readers: reader {self.number + 1} of {self.text.readers} has fewer "
                    f"than {self.sequence_length} tokens of {self.text.path}; lower it"
                )
            block = self._load()
        at = self.position
        first = int(block.order[at.window]) * self.sequence_length
        self.position = Position(at.epoch, at.block, at.window + 1, at.carry)
        part = block.parts[int(np.searchsorted(block.ends, first, side="right"))]
        return block.tokens[first : first + self.sequence_length + 1], part

    def _behind(self, block: _Block) -> Position:
        rest = block.tokens[len(block.order) * self.sequence_length :]
        if self.position.block + 1 < block.count:
            return Position(self.position.epoch, self.position.block + 1, 0, rest)
        return Position(self.position.epoch + 1, 0, 0, rest)

    def _load(self) -> _Block:
        at = self.position
        order = self.text.order(self.number, at.epoch)
        parts = order[at.block * BLOCK_PARTS : (at.block + 1) * BLOCK_PARTS]
        found = [self.text.training_tokens(part) for part in parts]
        carry = np.zeros(0) if at.carry is None else at.carry
        found.insert(0, carry.astype(self.text.dtype))
        tokens = np.concatenate(found)
        windows = max(len(tokens) - 1, 0) // self.sequence_length
        generator = generator_of(self.text.seed, self.number, at.epoch, at.block, -1)
        # What is left over was read with the part before; the first one stands for it.
        ends = np.cumsum([sum(map(len, found[:2])), *map(len, found[2:])])
        self._block = _Block(
            tokens,
            torch.randperm(windows, generator=generator).numpy(),
            parts,
            ends,
            self.text.blocks(self.number),
        )
        return self._block


@dataclass(frozen=True)
class _Block:
    """The tokens of some parts.

    Attributes:
        tokens: ``(tokens,)``.
        order: numbers of the windows, in the order in which they are taken.
        parts: numbers of the parts.
        ends: where the tokens of each part end.
        count: blocks of the epoch.
    """

    tokens: NDArray[Any]
    order: NDArray[np.int64]
    parts: list[int]
    ends: NDArray[np.int64]
    count: int
