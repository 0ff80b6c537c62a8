"""What a data module asks of the text that it trains on, whether that is prepared or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from moezoo_train.data.sources import Cutting
from moezoo_train.data.streams.batches import StreamLoader
from moezoo_train.data.windows import Batch, TokenBatches


class TrainedText(Protocol):
    """Text that is trained on; ``processed`` counts batches of each process."""

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token."""

    @property
    def tokenizer_place(self) -> str | Path:
        """Where its tokenizer is."""

    def token_counts(self) -> Tensor:
        """Count each token of the training split: ``(ids,)`` int64.

        Raises:
            InputError: it is not known beforehand.
        """

    def prepare(self, vocab_size: int) -> None:
        """Write what has to be on disk, in one process.

        Raises:
            InputError: a setting or the text is invalid.
        """

    def check(self, trainer: Trainer | None, stage: str | None, vocab_size: int) -> None:
        """Look at what is there, in every process.

        Raises:
            InputError: it does not fit the run, or cannot be read.
        """

    def train_loader(
        self, cutting: Cutting, processed: Callable[[], int], workers: int
    ) -> DataLoader[Batch] | StreamLoader:
        """Return the loader of a process's training batches, from those processed on.

        Raises:
            InputError: there is too little text, or the settings do not go together.
        """

    def val_batches(self, cutting: Cutting) -> TokenBatches:
        """Return a process's validation batches."""

    def describe(self, number: int, named: int) -> str:
        """Return where windows of a training batch are found, at most ``named`` of them."""

    def source_counts(self, processed: int, sequence_length: int) -> list[dict[str, Any]]:
        """Return how much was trained on of each of several sources, over all processes."""

    def order(self, cutting: Cutting) -> dict[str, Any]:
        """Return what the order of the batches depends on."""

    def check_order(self, changed: Sequence[str]) -> None:
        """Take note that a checkpoint has other values of what the order depends on.

        Raises:
            InputError: its position means nothing then.
        """

    def state_dict(self, processed: int) -> dict[str, Any]:
        """Return what a position is beside the number of batches."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
