"""The DataModule: prepared tokens as batches, with a position that survives interruption.

The position in the data *is* Lightning's own count of processed batches, which its checkpoints
hold. A data loader's own state would be ahead of it, by what its workers have fetched already.
Batches are a pure function of that count (see :mod:`moezoo_train.data.windows`), so that a run
resumed in the middle of an epoch, with any number of workers, goes on with exactly the batch it
would have had.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from moezoo.errors import InputError, check_int
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.data.loaders import whole_loader
from moezoo_train.data.mixing import DataSource
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.prepared_text import PreparedText
from moezoo_train.data.sources import Cutting, check_sources
from moezoo_train.data.streams.batches import StreamLoader
from moezoo_train.data.streams.data import StreamedData
from moezoo_train.data.text import TrainedText
from moezoo_train.data.windows import Batch

NAMED = 8
"""Windows of a batch that a message names."""


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
        val_fraction: share of the documents that is held out for validation, as for
            :func:`~moezoo_train.data.prepare.prepare`.
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
        self._tokenizer: Tokenizer | None = None
        self._order_before: dict[str, Any] | None = None
        self._text: TrainedText
        self.streams = stream
        if stream:
            if max_bytes is not None:
                raise InputError("max_bytes: streamed text is not counted; set stream to false")
            self._text = StreamedData(
                sources or [DataSource(source or "", 1.0, text_field, messages_field)],
                tokenizer,
                stream_readers,
                self.seed,
                val_fraction,
                split_seed,
                stream_val_bytes,
            )
        else:
            self._text = PreparedText(
                source,
                sources,
                data_dir,
                tokenizer,
                val_fraction,
                split_seed,
                text_field,
                messages_field,
                max_bytes,
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
        return self.all_prepared[0]

    @property
    def all_prepared(self) -> list[PreparedData]:
        """The tokens of each source.

        Raises:
            InputError: text is streamed, and never on disk.
        """
        if not isinstance(self._text, PreparedText):
            raise InputError("stream: streamed text has no prepared tokens; set it to false")
        return self._text.prepared

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token: bits per byte = nats / (ln 2 · this)."""
        return self._text.bytes_per_token

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._text.tokenizer_place)
            self._tokenizer.set_trained()
        return self._tokenizer

    def token_counts(self) -> Tensor:
        """Count each token of the training split, of all sources: ``(vocab_size,)`` int64."""
        counts = self._text.token_counts()
        return F.pad(counts, (0, self.vocab_size - len(counts)))

    def prepare_data(self) -> None:
        """Make the tokens if they are missing or out of date; Lightning calls it in one process."""
        self._text.prepare(self.vocab_size)
        self._tokenizer = None

    def setup(self, stage: str | None = None) -> None:
        """Check that the tokens are there and fit the vocabulary."""
        self._text.check(self.trainer, stage, self.vocab_size)

    def train_dataloader(self) -> DataLoader[Batch] | StreamLoader:
        """Return the loader of this process's training batches; its length is one epoch."""
        self._warn_of_another_order()
        return self._text.train_loader(self._cutting(), self._batches_processed, self.num_workers)

    def name_batch(self, back: int) -> str:
        """Return where the text of a training batch of this process is found, for messages.

        Args:
            back: batches between the current one and that.
        """
        return self._text.describe(self._batches_processed() - back, NAMED)

    def source_counts(self) -> list[dict[str, Any]]:
        """Return how much was trained on of each of several sources: path, windows, tokens, ..."""
        return self._text.source_counts(self._batches_processed(), self.sequence_length)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process's validation batches."""
        return whole_loader(self._text.val_batches(self._cutting()), self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches: there is no third split."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order of the batches depends on."""
        processed = self._batches_processed()
        state = {"batches_processed": processed, "order": self._text.order(self._cutting())}
        return state | self._text.state_dict(processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the order to compare it; the position comes back with the trainer's count."""
        self._order_before = state_dict["order"]
        self._text.load_state_dict(state_dict)

    def _warn_of_another_order(self) -> None:
        before, self._order_before = self._order_before, None
        if before is None:
            return
        order = self._text.order(self._cutting())
        changed = [name for name, value in order.items() if before.get(name) != value]
        self._text.check_order(changed)
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
