"""What a run reads of streamed texts: batches, what is held out, and a position to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from moezoo.errors import InputError, check_int
from moezoo_train.checkpoint_structure import is_whole
from moezoo_train.data.loaders import loader_options
from moezoo_train.data.mixing import DataSource, JoinedBatches, Schedule
from moezoo_train.data.sources import Cutting, check_sources
from moezoo_train.data.streams.batches import (
    Numbering,
    Progress,
    StreamBatches,
    StreamLoader,
)
from moezoo_train.data.streams.reader import Position
from moezoo_train.data.streams.source import HeldOut, StreamedText
from moezoo_train.data.windows import TokenBatches, ValBatches
from moezoo_train.parallel.distributed import gather_from_ranks


class StreamedData:
    """Texts that are tokenized while they are trained on.

    Args:
        sources: the texts.
        tokenizer: directory of the tokenizer, or "hf:NAME".
        readers: among whom each text is dealt.
        seed: chooses who reads what, and in which order.
        val_fraction: share of the documents that is held out.
        split_seed: chooses which.
        val_bytes: of those, text of each source that is validated on.

    Raises:
        InputError: a setting is out of range, or what only prepared text can do is asked for.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: str | None,
        readers: int,
        seed: int,
        val_fraction: float,
        split_seed: int,
        val_bytes: int,
    ) -> None:
        check_sources(sources)
        for source in sources:
            if source.messages_field is not None:
                raise InputError(
                    "messages_field: conversations are packed as a whole, and so not streamed; set "
                    "stream to false"
                )
        if tokenizer is None:
            raise InputError("tokenizer: streamed text needs one that is there; name it")
        self.sources = list(sources)
        self.readers = check_int("stream_readers", readers)
        self.val_bytes = check_int("stream_val_bytes", val_bytes)
        self._tokenizer = tokenizer
        self._settings = (readers, seed, val_fraction, split_seed)
        self._texts: list[StreamedText] | None = None
        self._held_out: list[HeldOut] = []
        self._progress: Progress | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def texts(self) -> list[StreamedText]:
        """The texts, whose files are looked at now.

        Raises:
            InputError: there are none, or too little text.
        """
        if self._texts is None:
            several = len(self.sources) > 1
            self._texts = []
            for number, source in enumerate(self.sources):
                try:
                    self._texts.append(self._open(source))
                except InputError as error:
                    problem = str(error).removeprefix("source: ")
                    place = f"sources[{number}]: {source.path}: " if several else ""
                    raise InputError(f"{place}{problem if several else error}") from error
        return self._texts

    def _open(self, source: DataSource) -> StreamedText:
        return StreamedText(source.path, source.text_field, self._tokenizer, *self._settings)

    @property
    def held_out(self) -> list[HeldOut]:
        """What is validated on of each text."""
        if not self._held_out:
            self._held_out = [text.held_out(self.val_bytes) for text in self.texts]
        return self._held_out

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token."""
        tokens = sum(len(each.tokens) for each in self.held_out)
        return sum(each.bytes for each in self.held_out) / tokens

    @property
    def tokenizer_place(self) -> str:
        """The tokenizer that was named."""
        return self._tokenizer

    def token_counts(self) -> Tensor:
        """Refuse to count what is not there yet.

        Raises:
            InputError: always.
        """
        raise InputError("stream: streamed tokens are not counted beforehand; set it to false")

    def prepare(self, vocab_size: int) -> None:
        """Do nothing: nothing is kept."""

    def train_loader(
        self, cutting: Cutting, processed: Callable[[], int], workers: int
    ) -> StreamLoader:
        """Return the loader of a process's training batches, which has no end.

        Raises:
            InputError: workers would share readers, or a checkpoint is of other text.
        """
        size, length = cutting.batch_size, cutting.sequence_length
        numbering = Numbering(size, cutting.world_size, cutting.rank, self.readers)
        numbering.check_workers(workers)
        weights = [source.weight for source in self.sources]
        progress = self._progress = Progress(numbering)
        if self._loaded is not None:
            progress.go_on(*self._positions(self._loaded), processed())

        def open_batches(positions: dict[int, list[Position]], first: int) -> StreamBatches:
            return StreamBatches(self.texts, weights, length, numbering, positions, first)

        options = {**loader_options(workers), "persistent_workers": False}
        return StreamLoader(open_batches, progress, processed, options)

    def val_batches(self, cutting: Cutting) -> TokenBatches:
        """Return a process's validation batches: what is held out, each window once."""
        length, size, _, vocab_size, world_size, rank = cutting
        found = [each.tokens for each in self.held_out]
        if len(found) == 1:
            own = {"rank": rank, "world_size": world_size, "vocab_size": vocab_size}
            return ValBatches(found[0], length, size, **own)
        windows = [ValBatches(tokens, length, 1, vocab_size=vocab_size) for tokens in found]
        return JoinedBatches(windows, size, rank, world_size)

    def check(self, trainer: Trainer | None, stage: str | None, vocab_size: int) -> None:
        """Look at the files, and read what is held out.

        Raises:
            InputError: there are none, or they are not readable; or a run is to end with the text.
        """
        epochs = None if trainer is None or stage != "fit" else trainer.max_epochs
        if epochs not in (None, -1):
            raise InputError(
                f"trainer.max_epochs: {epochs} passes have no known end where text is streamed; "
                "leave it at -1 and set trainer.max_steps"
            )
        self.held_out  # noqa: B018 - read now

    def check_order(self, changed: Sequence[str]) -> None:
        """Refuse to go on where a position of the checkpoint means something else.

        Raises:
            InputError: the text or what else a position depends on has changed.
        """
        if wrong := [name for name in changed if name != "batch_size"]:
            raise InputError(
                f"ckpt_path: streamed text goes on only as it began; the checkpoint has another "
                f"{', '.join(wrong)} in data; set that back, or begin another run"
            )

    def order(self, cutting: Cutting) -> dict[str, Any]:
        """Return what a position depends on."""
        return {
            "text": [text.fingerprint() for text in self.texts],
            "weights": [source.weight for source in self.sources],
            "sequence_length": cutting.sequence_length,
            "stream_readers": self.readers,
            "seed": self._settings[1],
            "batch_size": cutting.batch_size,
        }

    def state_dict(self, processed: int) -> dict[str, Any]:
        """Return where readers stand; all processes must call this together."""
        progress = self._progress
        if progress is None:
            return {"first": 0, "readers": {}}
        first = progress.settle(processed)
        found = dict(progress.positions)
        moved = {reader: progress.positions[reader] for reader in progress.moved}
        for of_rank in gather_from_ranks(moved):
            found |= of_rank
        states = {n: [each.state_dict() for each in found[n]] for n in sorted(found)}
        return {"first": first, "readers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, once the order is known to be the same."""
        self._loaded = state

    def _positions(self, state: dict[str, Any]) -> tuple[dict[int, list[Position]], int]:
        try:
            found = {
                int(reader): [Position.of(each) for each in positions]
                for reader, positions in state["readers"].items()
            }
            if not is_whole(state["first"]) or any(
                len(each) != len(self.sources) for each in found.values()
            ):
                raise ValueError("it is of other texts")
            return found, state["first"]
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise InputError("ckpt_path: the position in the checkpoint is damaged") from error

    def describe(self, number: int, named: int) -> str:
        """Return where the windows of a training batch of this process are found."""
        places = self._progress.places(number) if self._progress is not None else []
        found = list(dict.fromkeys(self.texts[text].name_of(part) for text, part in places))
        if not found:
            return f"batch {number + 1}"
        more = ", …" if len(found) > named else ""
        return f"batch {number + 1}, whose windows are of {', '.join(found[:named])}{more}"

    def source_counts(self, processed: int, sequence_length: int) -> list[dict[str, Any]]:
        """Return how much was trained on of each of several texts, over all processes.

        How often that goes through a text is a mean over the readers of this process.
        """
        progress = self._progress
        if progress is None or len(self.sources) < 2:
            return []
        windows = progress.settle(processed) * progress.numbering.batch_size
        schedule = Schedule([source.weight for source in self.sources], self._settings[1])
        taken = schedule.taken(windows)
        return [
            {
                "path": source.path,
                "weight": source.weight,
                "windows": taken[number],
                "tokens": taken[number] * sequence_length,
                "epochs": self._epochs(progress, number),
            }
            for number, source in enumerate(self.sources)
        ]

    def _epochs(self, progress: Progress, number: int) -> float:
        found = [
            each[number].epoch + each[number].block / self.texts[number].blocks(reader)
            for reader, each in progress.positions.items()
        ]
        return sum(found) / max(len(found), 1)
