"""Text that is prepared before it is trained on: shards of tokens on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from moezoo.errors import InputError
from moezoo_train.data.loaders import ResumableLoader
from moezoo_train.data.mixing import DataSource
from moezoo_train.data.prepare import prepare
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.sources import (
    Cutting,
    TrainingBatches,
    describe_batch,
    prepare_sources,
    prepared_place,
    source_counts,
    train_batches,
    val_batches,
)
from moezoo_train.data.windows import Batch, TokenBatches

_RENAMED = {"output": "data_dir", "seed": "split_seed"}
"""Options that `prepare` names otherwise than a run."""


class PreparedText:
    """One text, or several, whose tokens lie in a directory.

    Args:
        source: the text; None for tokens that are there already.
        sources: several texts instead, or None.
        data_dir: where the tokens are.
        tokenizer: directory of the tokenizer, or "hf:NAME"; None trains one.
        val_fraction: share of the documents that is held out.
        split_seed: chooses which.
        text_field: field of a row that holds the text.
        messages_field: field of a row that holds a conversation.
        max_bytes: use about so much of the text only, or of each.
    """

    def __init__(
        self,
        source: str | None,
        sources: list[DataSource] | None,
        data_dir: str,
        tokenizer: str | None,
        val_fraction: float,
        split_seed: int,
        text_field: str,
        messages_field: str | None,
        max_bytes: int | None,
    ) -> None:
        self.source, self.sources, self.data_dir = source, sources, data_dir
        self._tokenizer, self._text_field, self._messages = tokenizer, text_field, messages_field
        self._split: dict[str, Any] = {
            "val_fraction": val_fraction,
            "seed": split_seed,
            "max_bytes": max_bytes,
        }
        self._prepared: list[PreparedData] | None = None
        self._batches: TrainingBatches | None = None

    @property
    def prepared(self) -> list[PreparedData]:
        """The tokens of each source.

        Raises:
            InputError: they are missing or damaged.
        """
        if self._prepared is None:
            places = [Path(self.data_dir)]
            if self.sources is not None:
                numbered = enumerate(self.sources)
                places = [prepared_place(self.data_dir, each, number) for number, each in numbered]
            self._prepared = [PreparedData.load(place) for place in places]
        return self._prepared

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token that is scored."""
        splits = [prepared.val for prepared in self.prepared]
        return sum(s.bytes for s in splits) / sum(s.scored or s.tokens for s in splits)

    @property
    def tokenizer_place(self) -> Path:
        """The tokenizer beside the tokens; of several sources, of the first."""
        return self.prepared[0].tokenizer_directory

    def token_counts(self) -> Tensor:
        """Count each token of the training split, of all sources."""
        found = [torch.from_numpy(each.token_counts("train")) for each in self.prepared]
        return torch.stack(found).sum(0)

    def prepare(self, vocab_size: int) -> None:
        """Make the tokens if they are missing or out of date, or compare their checksums."""
        if self.sources is not None:
            assert self._tokenizer is not None
            prepare_sources(self.sources, self.data_dir, self._tokenizer, **self._split)
        elif self.source is None:
            self.prepared[0].check_sums()
            return
        else:
            try:
                prepare(
                    source=self.source,
                    output=self.data_dir,
                    vocab_size=vocab_size,
                    tokenizer=self._tokenizer,
                    text_field=self._text_field,
                    messages_field=self._messages,
                    **self._split,
                )
            except InputError as error:
                field, _, problem = str(error).partition(": ")
                if field not in _RENAMED:
                    raise
                raise InputError(f"{_RENAMED[field]}: {problem}") from error
        self._prepared = None

    def check(self, trainer: Trainer | None, stage: str | None, vocab_size: int) -> None:
        """Check that the tokens are there and fit the vocabulary."""
        for prepared in self.prepared:
            if prepared.vocab_size > vocab_size:
                raise InputError(
                    f"vocab_size: the tokens in {prepared.directory} have {prepared.vocab_size} "
                    f"ids, but the vocabulary is {vocab_size}; prepare them again"
                )
        if self.source is None and self._messages is not None and not self.prepared[0].chat:
            raise InputError(
                f"messages_field: the tokens in {self.data_dir} are of text; prepare them with it"
            )

    def train_loader(
        self, cutting: Cutting, processed: Callable[[], int], workers: int
    ) -> DataLoader[Batch]:
        """Return the loader of a process's training batches; its length is one epoch."""
        weights = [source.weight for source in self.sources or []]
        self._batches = train_batches(self.prepared, weights, cutting)
        return ResumableLoader(self._batches, processed, workers)

    def val_batches(self, cutting: Cutting) -> TokenBatches:
        """Return a process's validation batches."""
        return val_batches(self.prepared, cutting)

    def describe(self, number: int, named: int) -> str:
        """Return at which tokens the windows of a training batch begin."""
        assert self._batches is not None
        return describe_batch(self.prepared, self._batches, number, named)

    def source_counts(self, processed: int, sequence_length: int) -> list[dict[str, Any]]:
        """Return how much was trained on of each of several sources, over all processes."""
        return source_counts(self.sources or [], self._batches, processed)

    def order(self, cutting: Cutting) -> dict[str, Any]:
        """Return what the order of the batches depends on."""
        inputs = [prepared.inputs for prepared in self.prepared]
        several = {} if self.sources is None else {"weights": [s.weight for s in self.sources]}
        return {
            "tokens": inputs[0] if self.sources is None else inputs,
            **several,
            "sequence_length": cutting.sequence_length,
            "batch_size": cutting.batch_size,
            "processes": cutting.world_size,
            "seed": cutting.seed,
        }

    def check_order(self, changed: Sequence[str]) -> None:
        """Accept any: a position is a number of batches, of whatever order."""

    def state_dict(self, processed: int) -> dict[str, Any]:
        """Return nothing: the number of batches is the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: see :meth:`state_dict`."""
