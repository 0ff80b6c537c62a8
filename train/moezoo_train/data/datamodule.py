"""The DataModule: prepared tokens as batches, with a position that survives interruption.

The position in the data *is* Lightning's own count of processed batches, which its checkpoints
hold. A data loader's own state would be ahead of it, by what its workers have fetched already.
Batches are a pure function of that count (see :mod:`moezoo_train.data.windows`), so that a run
resumed in the middle of an epoch, with any number of workers, goes on with exactly the batch it
would have had.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from moezoo.errors import InputError, check_int
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.data.mixing import DataSource
from moezoo_train.data.prepare import prepare
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.sources import (
    Cutting,
    TrainingBatches,
    check_sources,
    describe_batch,
    prepare_sources,
    prepared_place,
    source_counts,
    train_batches,
    val_batches,
)
from moezoo_train.data.streams.batches import StreamLoader
from moezoo_train.data.streams.data import StreamedData
from moezoo_train.data.windows import Batch, BatchNumbers, TokenBatches

NAMED = 8
"""Windows of a batch that a message names."""


_RENAMED = {"output": "data_dir", "seed": "split_seed"}
"""Options that `prepare` names otherwise than a run."""


class TokenDataModule(LightningDataModule):
    """Token batches for causal language modelling.

    A batch is ``{"input_ids": (B, S), "labels": (B, S)}``, both int64, the labels the next tokens
    and -100 where nothing is scored: at the end of validation, and of conversations all that the
    assistant does not say. Validation batches hold different numbers of scored tokens: average over
    tokens, not over batches.

    Args:
        source: text to train on: "stdlib" (the Python standard library's own source code), a .txt,
            .jsonl or .parquet file, a folder or glob of those, or "hf:NAME[:CONFIG]"; null to take
            data_dir as `moezoo prepare` left it.
        data_dir: where the prepared tokens are kept; they are made again if anything they depend on
            has changed.
        vocab_size: number of tokens of the tokenizer that is trained.
        tokenizer: directory of a tokenizer to use instead, or "hf:NAME".
        sequence_length: tokens per window (S).
        batch_size: windows per batch and process (B).
        num_workers: processes that load batches; 0 loads them in the training process.
        seed: chooses the order of the training windows.
        val_fraction: share of the documents that is held out for validation.
        split_seed: chooses which documents are held out.
        text_field: field of a .jsonl row, or column of a .parquet file, that holds the text.
        max_bytes: use only about this much of the text, or of each of several.
        messages_field: field of a row that holds a conversation, a list of messages with role and
            content. It is read instead of text, written by the tokenizer's chat template, and only
            what the assistant says is learned.
        sources: several texts instead of one, each with path and weight; they are validated on
            one behind the other. They need a tokenizer.
        stream: tokenize the text while training, and keep nothing in data_dir; for text that would
            not fit there. It needs a tokenizer, and has no end: set the trainer's max_steps.
        stream_readers: with stream, readers that a text is dealt to; a multiple of the processes
            times their workers. The batches depend on it, and on no number of either.
        stream_val_bytes: with stream, how much of each source's held-out text is validated on.

    Attributes:
        vocab_size: number of token ids, known from the beginning.

    Raises:
        InputError: a setting, the tokenizer or (from ``prepare_data`` and ``setup`` on) the data
            are invalid.
    """

    def __init__(
        self,
        source: str | None = "stdlib",
        data_dir: str = "runs/data",
        vocab_size: int = 2048,
        tokenizer: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.02,
        split_seed: int = 0,
        text_field: str = "text",
        max_bytes: int | None = None,
        messages_field: str | None = None,
        sources: list[DataSource] | None = None,
        stream: bool = False,
        stream_readers: int = 16,
        stream_val_bytes: int = 1_000_000,
    ) -> None:
        super().__init__()
        if sources is not None:
            check_sources(sources)
            if source not in (None, "stdlib"):
                raise InputError("sources: there is a source too; give one of the two")
            if messages_field is not None or text_field != "text":
                raise InputError(
                    "sources: each has its own text_field and messages_field; give them there"
                )
            if tokenizer is None:
                raise InputError("tokenizer: several sources need one that is there; name it")
        self.sources = sources
        self.messages_field = messages_field
        self.source = source
        self.data_dir = data_dir
        self.tokenizer_name = tokenizer
        self.sequence_length = check_int("sequence_length", sequence_length)
        self.batch_size = check_int("batch_size", batch_size)
        self.num_workers = check_int("num_workers", num_workers, minimum=0)
        self.seed = check_int("seed", seed, minimum=0)
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.text_field = text_field
        self.max_bytes = max_bytes
        self._prepared: PreparedData | None = None
        self._tokenizer: Tokenizer | None = None
        self._all_prepared: list[PreparedData] | None = None
        self._train_batches: TrainingBatches | None = None
        self._order_before: dict[str, Any] | None = None
        self._stream: StreamedData | None = None
        self.streams = stream
        if stream:
            if max_bytes is not None:
                raise InputError("max_bytes: streamed text is not counted; set stream to false")
            self._stream = StreamedData(
                sources or [DataSource(source or "", 1.0, text_field, messages_field)],
                tokenizer,
                stream_readers,
                self.seed,
                val_fraction,
                split_seed,
                stream_val_bytes,
            )
        if not stream and source is None and sources is None:
            self.vocab_size = self.prepared.vocab_size
        elif tokenizer is not None:
            self.vocab_size = load_tokenizer(tokenizer).vocab_size
        else:
            self.vocab_size = check_int("vocab_size", vocab_size)

    @property
    def prepared(self) -> PreparedData:
        """The tokens on disk; of several sources, those of the first."""
        if self.sources is not None:
            return self.all_prepared[0]
        if self._prepared is None:
            self._prepared = PreparedData.load(self.data_dir)
        return self._prepared

    @property
    def all_prepared(self) -> list[PreparedData]:
        """The tokens of each source."""
        if self.sources is None:
            return [self.prepared]
        if self._all_prepared is None:
            self._all_prepared = [
                PreparedData.load(prepared_place(self.data_dir, source, number))
                for number, source in enumerate(self.sources)
            ]
        return self._all_prepared

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token: bits per byte = nats / (ln 2 · this)."""
        if self._stream is not None:
            return self._stream.bytes_per_token
        splits = [prepared.val for prepared in self.all_prepared]
        return sum(s.bytes for s in splits) / sum(s.scored or s.tokens for s in splits)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens."""
        if self._tokenizer is None:
            own = self.tokenizer_name if self._stream is not None else None
            self._tokenizer = load_tokenizer(own or self.prepared.tokenizer_directory)
            self._tokenizer.set_trained()
        return self._tokenizer

    def token_counts(self) -> Tensor:
        """Count each token of the training split, of all sources: ``(vocab_size,)`` int64."""
        if self._stream is not None:
            raise InputError("stream: streamed tokens are not counted beforehand; set it to false")
        found = [torch.from_numpy(each.token_counts("train")) for each in self.all_prepared]
        return F.pad(sum(found[1:], found[0]), (0, self.vocab_size - len(found[0])))

    def prepare_data(self) -> None:
        """Make the tokens if they are missing or out of date; Lightning calls it in one process."""
        if self._stream is not None:
            return
        if self.sources is not None:
            assert self.tokenizer_name is not None
            prepare_sources(
                self.sources,
                self.data_dir,
                self.tokenizer_name,
                val_fraction=self.val_fraction,
                seed=self.split_seed,
                max_bytes=self.max_bytes,
            )
            self._all_prepared = self._tokenizer = None
        elif self.source is None:
            self.prepared.check_sums()
        else:
            try:
                prepare(
                    source=self.source,
                    output=self.data_dir,
                    vocab_size=self.vocab_size,
                    tokenizer=self.tokenizer_name,
                    val_fraction=self.val_fraction,
                    text_field=self.text_field,
                    seed=self.split_seed,
                    max_bytes=self.max_bytes,
                    messages_field=self.messages_field,
                )
            except InputError as error:
                field, _, problem = str(error).partition(": ")
                if field not in _RENAMED:
                    raise
                raise InputError(f"{_RENAMED[field]}: {problem}") from error
            self._prepared = self._tokenizer = None

    def setup(self, stage: str | None = None) -> None:
        """Check that the tokens are there and fit the vocabulary."""
        if self._stream is not None:
            self._stream.check(self.trainer, stage)
            return
        for prepared in self.all_prepared:
            if prepared.vocab_size > self.vocab_size:
                raise InputError(
                    f"vocab_size: the tokens in {prepared.directory} have {prepared.vocab_size} "
                    f"ids, but the vocabulary is {self.vocab_size}; prepare them again"
                )
        if self.source is None and self.messages_field is not None and not self.prepared.chat:
            raise InputError(
                f"messages_field: the tokens in {self.data_dir} are of text; prepare them with it"
            )

    def train_dataloader(self) -> DataLoader[Batch] | StreamLoader:
        """Return the loader of this process's training batches; its length is one epoch."""
        if self._stream is not None:
            self._warn_of_another_order()
            return self._stream.train_loader(
                self._cutting(), self._batches_processed, _loader_options(self.num_workers)
            )
        weights = [source.weight for source in self.sources or []]
        batches = train_batches(self.all_prepared, weights, self._cutting())
        self._train_batches = batches
        self._warn_of_another_order()
        return _ResumableLoader(batches, self._batches_processed, self.num_workers)

    def name_batch(self, back: int) -> str:
        """Return where the text of a training batch of this process is found, for messages.

        Args:
            back: batches between the current one and that.
        """
        number = self._batches_processed() - back
        if self._stream is not None:
            return self._stream.describe(number, NAMED)
        assert self._train_batches is not None
        return describe_batch(self.all_prepared, self._train_batches, number, NAMED)

    def source_counts(self) -> list[dict[str, Any]]:
        """Return how much was trained on of each of several sources: path, windows, tokens, ..."""
        processed = self._batches_processed()
        if self._stream is not None:
            return self._stream.source_counts(processed, self.sequence_length)
        return source_counts(self.sources or [], self._train_batches, processed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process's validation batches."""
        if self._stream is not None:
            batches = self._stream.val_batches(self._cutting())
        else:
            batches = val_batches(self.all_prepared, self._cutting())
        return _loader(batches, BatchNumbers(batches), self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches: there is no third split."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order of the batches depends on."""
        processed = self._batches_processed()
        state = {"batches_processed": processed, "order": self._order()}
        return state if self._stream is None else state | self._stream.state_dict(processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the order to compare it; the position comes back with the trainer's count."""
        self._order_before = state_dict["order"]
        if self._stream is not None:
            self._stream.load_state_dict(state_dict)

    def _order(self) -> dict[str, Any]:
        if self._stream is not None:
            return {**self._stream.order(self.sequence_length), "batch_size": self.batch_size}
        inputs = [prepared.inputs for prepared in self.all_prepared]
        several = {} if self.sources is None else {"weights": [s.weight for s in self.sources]}
        return {
            "tokens": inputs[0] if self.sources is None else inputs,
            **several,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "processes": self._data_parallel()[0],
            "seed": self.seed,
        }

    def _warn_of_another_order(self) -> None:
        before, self._order_before = self._order_before, None
        if before is None:
            return
        changed = [name for name, value in self._order().items() if before.get(name) != value]
        if self._stream is not None:
            self._stream.check_order(changed)
        if changed:
            rank_zero_warn(
                f"data: resumed with other {', '.join(changed)} than in the checkpoint, so the "
                "batches are not those of the uninterrupted run"
            )

    def _cutting(self) -> Cutting:
        processes = self._data_parallel()
        sizes = (self.sequence_length, self.batch_size, self.seed, self.vocab_size)
        return Cutting(*sizes, *processes)

    def _data_parallel(self) -> tuple[int, int]:
        """Return the number of processes with different data, and which of them this is."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (1, 0) if kwargs is None else (kwargs["num_replicas"], kwargs["rank"])

    def _batches_processed(self) -> int:
        if self.trainer is None:
            return 0
        # Not `ready`, which may be one ahead of what a checkpoint has trained on.
        return int(
            self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["total"]["processed"]
        )


class _ResumableLoader(DataLoader[Batch]):
    """Training batches from the trainer's position on.

    Having a state tells Lightning that resuming within an epoch is safe; it is written for the
    reader of a checkpoint, as the position is restored with the trainer's own progress.
    """

    def __init__(self, batches: TokenBatches, position: Callable[[], int], workers: int) -> None:
        sampler = BatchNumbers(batches, first=position)
        super().__init__(batches, sampler=sampler, **_loader_options(workers))
        self._position = position

    def state_dict(self) -> dict[str, int]:
        return {"batches_processed": self._position()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass


def _loader(batches: TokenBatches, sampler: BatchNumbers, workers: int) -> DataLoader[Batch]:
    return DataLoader(batches, sampler=sampler, **_loader_options(workers))


def _loader_options(workers: int) -> dict[str, Any]:
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
