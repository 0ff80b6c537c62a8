"""What is trained on: one prepared text, or several with weights, each with batches of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.errors import InputError
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.mixing import DataSource, JoinedBatches, MixedBatches, shares
from moezoo_train.data.packing import TrainConversations, ValConversations
from moezoo_train.data.prepare import prepare
from moezoo_train.data.prepared import META_FILE, PreparedData
from moezoo_train.data.windows import TokenBatches, TrainBatches, ValBatches


class Cutting(NamedTuple):
    """How batches are cut; the names are those of :class:`TokenDataModule`.

    Attributes:
        sequence_length: tokens per window.
        batch_size: windows per batch and process.
        seed: chooses the order of the training windows.
        vocab_size: bound of the ids.
        world_size: processes with different data.
        rank: which of them this is.
    """

    sequence_length: int
    batch_size: int
    seed: int
    vocab_size: int
    world_size: int
    rank: int

    def single(self) -> Cutting:
        """Return the same with batches of one window for one process."""
        return Cutting(self.sequence_length, 1, self.seed, self.vocab_size, 1, 0)

    def of_source(self, number: int) -> Cutting:
        """Return single windows of one of several sources, with a seed of its own."""
        return Cutting(self.sequence_length, 1, self.seed + number, self.vocab_size, 1, 0)


TrainingBatches = TrainBatches | TrainConversations | MixedBatches


def check_sources(sources: Sequence[DataSource]) -> None:
    """Refuse sources without a path, and weights that are out of range.

    Raises:
        InputError: names the source.
    """
    if not sources:
        raise InputError("sources: there are none; give a list of path and weight, or `source`")
    for number, source in enumerate(sources):
        if not source.path:
            raise InputError(f"sources[{number}].path: it is empty; give a path")
    shares([source.weight for source in sources])


def prepared_place(data_dir: str, source: DataSource, number: int) -> Path:
    """Return where the tokens of one of several sources are, or will be."""
    own = Path(source.path)
    return own if (own / META_FILE).is_file() else Path(data_dir, f"source-{number}")


def prepare_sources(
    sources: Sequence[DataSource], data_dir: str, tokenizer: str, **options: Any
) -> None:
    """Make the tokens of sources that are text; compare those of the others with their checksums.

    Raises:
        InputError: names the source that cannot be prepared, or has another tokenizer.
    """
    wanted = load_tokenizer(tokenizer).fingerprint()
    if any(prepared_place(data_dir, *each) != Path(each[0].path) for each in _numbered(sources)):
        Path(data_dir).mkdir(parents=True, exist_ok=True)
    for source, number in _numbered(sources):
        place = prepared_place(data_dir, source, number)
        try:
            if place == Path(source.path):
                prepared = PreparedData.load(place)
                prepared.check_sums()
                if load_tokenizer(prepared.tokenizer_directory).fingerprint() != wanted:
                    raise InputError("its tokens were made with another tokenizer; prepare it anew")
            else:
                prepare(
                    source.path,
                    place,
                    tokenizer=tokenizer,
                    text_field=source.text_field,
                    messages_field=source.messages_field,
                    **options,
                )
        except InputError as error:
            problem = str(error).removeprefix("source: ").removeprefix("data_dir: ")
            raise InputError(f"sources[{number}]: {source.path}: {problem}") from error


def train_batches(
    prepared: Sequence[PreparedData], weights: Sequence[float], cutting: Cutting
) -> TrainingBatches:
    """Return the training batches of one prepared text, or of several.

    Raises:
        InputError: there is too little text for one batch.
    """
    if len(prepared) == 1:
        return _train(prepared[0], cutting)
    windows = [_train(data, cutting.of_source(k)) for k, data in enumerate(prepared)]
    return MixedBatches(
        windows, weights, cutting.batch_size, cutting.seed, cutting.rank, cutting.world_size
    )


def val_batches(prepared: Sequence[PreparedData], cutting: Cutting) -> TokenBatches:
    """Return the validation batches of one prepared text, or of several, one behind the other."""
    if len(prepared) == 1:
        return _val(prepared[0], cutting)
    windows = [_val(data, cutting.single()) for data in prepared]
    return JoinedBatches(windows, cutting.batch_size, cutting.rank, cutting.world_size)


def describe_batch(
    prepared: Sequence[PreparedData], batches: TrainingBatches, number: int, named: int
) -> str:
    """Return where the windows of a training batch are found, at most ``named`` of them."""
    if isinstance(batches, MixedBatches):
        windows = batches.windows(number)
        places = [
            f"{batches.sources[k].starts(j)[0]} of {prepared[k].file('train')}"
            for k, j in windows[:named]
        ]
        more = ", …" if len(windows) > named else ""
        return f"batch {number + 1}, whose windows begin at tokens {', '.join(places)}{more}"
    starts = batches.starts(number).tolist()
    shown = ", ".join(map(str, starts[:named])) + (", …" if len(starts) > named else "")
    file = prepared[0].file("train")
    return f"batch {number + 1}, whose windows begin at tokens {shown} of {file}"


def source_counts(
    sources: Sequence[DataSource], batches: TrainingBatches | None, processed: int
) -> list[dict[str, Any]]:
    """Return how much was trained on of each of several sources, over all processes.

    Args:
        sources: of the run; a run of one has no counts.
        batches: its training batches.
        processed: batches of each process that were trained on.
    """
    if not isinstance(batches, MixedBatches):
        return []
    windows = processed * batches.batch_size * batches.world_size
    return [
        {
            "path": source.path,
            "weight": source.weight,
            "windows": taken,
            "tokens": taken * batches.sequence_length,
            "epochs": taken / len(own),
        }
        for source, own, taken in zip(
            sources, batches.sources, batches.schedule.taken(windows), strict=True
        )
    ]


def _numbered(sources: Sequence[DataSource]) -> list[tuple[DataSource, int]]:
    return [(source, number) for number, source in enumerate(sources)]


def _train(prepared: PreparedData, cutting: Cutting) -> TrainBatches | TrainConversations:
    length, size, seed, vocab_size, world_size, rank = cutting
    tokens = prepared.tokens("train")
    if prepared.chat:
        marks = prepared.marks("train")
        return TrainConversations(
            tokens, marks, length, size, seed, rank, world_size, vocab_size=vocab_size
        )
    return TrainBatches(tokens, length, size, seed, rank, world_size, vocab_size=vocab_size)


def _val(prepared: PreparedData, cutting: Cutting) -> TokenBatches:
    length, size, _, vocab_size, world_size, rank = cutting
    tokens = prepared.tokens("val")
    own = {"rank": rank, "world_size": world_size, "vocab_size": vocab_size}
    if prepared.chat:
        return ValConversations(tokens, prepared.marks("val"), length, size, **own)
    return ValBatches(tokens, length, size, **own)
