"""torch's loaders of batches that are whole already."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from moezoo_train.data.windows import Batch, BatchNumbers, TokenBatches


class ResumableLoader(DataLoader[Batch]):
    """Training batches from the trainer's position on.

    Having a state tells Lightning that resuming within an epoch is safe; it is written for the
    reader of a checkpoint, as the position is restored with the trainer's own progress.
    """

    def __init__(self, batches: TokenBatches, position: Callable[[], int], workers: int) -> None:
        sampler = BatchNumbers(batches, first=position)
        super().__init__(batches, sampler=sampler, **loader_options(workers))
        self._position = position

    def state_dict(self) -> dict[str, int]:
        """Return the position, for readers of a checkpoint."""
        return {"batches_processed": self._position()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: see the class."""


def whole_loader(batches: TokenBatches, workers: int) -> DataLoader[Batch]:
    """Return a loader of all batches, from the first."""
    return DataLoader(batches, sampler=BatchNumbers(batches), **loader_options(workers))


def loader_options(workers: int) -> dict[str, Any]:
    """Return the options of every loader."""
    return {
        "batch_size": None,  # an item is a whole batch already
        "num_workers": workers,
        "worker_init_fn": _leave_signals_to_parent,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def _leave_signals_to_parent(_: int) -> None:
    """Ignore Ctrl-C in a worker process, which a terminal sends to it as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
