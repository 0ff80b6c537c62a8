"""A directory of prepared tokens, as training reads it.

``train.bin`` and ``val.bin`` hold token ids as little-endian uint16, or uint32 where the vocabulary
needs it, document after document, each closed by the end-of-text token (and opened by the
beginning-of-text token of a tokenizer that has a separate one). ``tokenizer/`` holds the tokenizer
and ``meta.json`` the counts and what everything was made from.

Conversations stand there as their chat template writes them, with nothing between them. Beside
them ``train.marks`` and ``val.marks`` hold one byte for each token: 1 where it is to be predicted,
2 where a conversation begins.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import one_line
from moezoo_models.files.checksums import crc_of_file

SplitName = Literal["train", "val"]
FORMAT = 2
META_FILE = "meta.json"
TOKENIZER_FOLDER = "tokenizer"
SCORED = 1
"""Mark of a token that the assistant says."""
OPENS = 2
"""Mark of the first token of a conversation."""
_SUM = "crc32"
_COUNTED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Split:
    """How much there is in one split.

    Attributes:
        documents: number of documents.
        tokens: number of token ids, document boundaries included.
        bytes: length of the text in UTF-8; of conversations, of what is scored.
        crc32: checksum of the file of token ids.
        scored: of conversations, number of tokens that the assistant says.
        marks_crc32: of conversations, checksum of the file of marks.
    """

    documents: int
    tokens: int
    bytes: int
    crc32: int
    scored: int | None = None
    marks_crc32: int | None = None


@dataclass(frozen=True)
class PreparedData:
    """Prepared tokens on disk.

    Attributes:
        directory: where they are.
        vocab_size: every token id is smaller.
        train: size of the training split.
        val: size of the validation split.
        inputs: what they were made from: hash of the source's content, settings, tokenizer.
        tokenizer_hash: hash of the files in ``tokenizer/``.
    """

    directory: Path
    vocab_size: int
    train: Split
    val: Split
    inputs: dict[str, Any]
    tokenizer_hash: str

    @classmethod
    def load(cls, directory: str | Path) -> PreparedData:
        """Read what ``moezoo prepare`` left in ``directory``.

        Raises:
            InputError: there are no prepared tokens, or not all of them. What is in the files is
                for :meth:`check_sums`, which reads all of them.
        """
        directory = Path(directory)
        advice = f"run `moezoo prepare --output {directory}`"
        try:
            meta = json.loads((directory / META_FILE).read_text())
            written = meta.pop(_SUM, None)
            prepared = cls(
                directory=directory,
                vocab_size=_count(meta["vocab_size"]),
                train=_split(meta["train"]),
                val=_split(meta["val"]),
                inputs=_of_kind(meta["inputs"], dict),
                tokenizer_hash=_of_kind(meta["tokenizer_hash"], str),
            )
            # Earlier versions wrote no checksum; the vocabulary is among the inputs as well.
            if written is not None and written != _sum(meta):
                raise ValueError("its checksum is wrong")
            if prepared.vocab_size != prepared.inputs["vocab_size"]:
                raise ValueError("its vocabulary is not that of its inputs")
        except FileNotFoundError as error:
            raise InputError(f"data_dir: {directory} holds no prepared tokens; {advice}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"data_dir: {directory / META_FILE} is broken ({one_line(error)}); {advice}"
            ) from error
        except OSError as error:
            raise InputError(
                f"data_dir: {directory} cannot be read: {error.strerror}; run moezoo prepare, or "
                "name another"
            ) from error
        for name in ("train", "val"):
            file = prepared.file(name)
            expected = prepared.split(name).tokens * prepared.dtype.itemsize
            if not file.is_file() or file.stat().st_size != expected:
                raise InputError(f"data_dir: {file} is missing or truncated; {advice}")
            marks = prepared.marks_file(name)
            if prepared.chat and not (
                marks.is_file() and marks.stat().st_size == prepared.split(name).tokens
            ):
                raise InputError(f"data_dir: {marks} is missing or truncated; {advice}")
        if hash_folder(prepared.tokenizer_directory) != prepared.tokenizer_hash:
            raise InputError(
                f"data_dir: {prepared.tokenizer_directory} is not the tokenizer of these tokens; "
                f"{advice}"
            )
        return prepared

    def check_sums(self) -> None:
        """See that the tokens are those that were written.

        Raises:
            InputError: names the file that is not.
        """
        names: tuple[SplitName, ...] = ("train", "val")
        for name in names:
            sums = {self.file(name): self.split(name).crc32}
            if (of_marks := self.split(name).marks_crc32) is not None:
                sums[self.marks_file(name)] = of_marks
            for file, expected in sums.items():
                if crc_of_file(file) != expected:
                    raise InputError(
                        f"data_dir: {file} is damaged: its checksum is wrong; run `moezoo "
                        f"prepare --output {self.directory}`"
                    )

    def write_meta(self, file: Path) -> None:
        """Write ``meta.json``."""
        meta = asdict(self)
        del meta["directory"]
        for name in ("train", "val"):
            meta[name] = {key: value for key, value in meta[name].items() if value is not None}
        meta[_SUM] = _sum(meta)
        file.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored ids."""
        return token_dtype(self.vocab_size)

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer is."""
        return self.directory / TOKENIZER_FOLDER

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token, which turns nats per token into bits per byte."""
        return self.val.bytes / (self.val.scored or self.val.tokens)

    @property
    def chat(self) -> bool:
        """Whether these are conversations, of which only what the assistant says is scored."""
        return self.train.scored is not None and self.val.scored is not None

    def split(self, name: SplitName) -> Split:
        """Return the size of a split."""
        return self.train if name == "train" else self.val

    def file(self, name: SplitName) -> Path:
        """Return where the tokens of a split are."""
        return self.directory / f"{name}.bin"

    def marks_file(self, name: SplitName) -> Path:
        """Return where the marks of a split's tokens are, if these are conversations."""
        return self.directory / f"{name}.marks"

    def marks(self, name: SplitName) -> NDArray[np.uint8]:
        """Map the marks of a split's tokens, shape (tokens,), into memory."""
        return np.memmap(self.marks_file(name), dtype=np.uint8, mode="r")

    def tokens(self, name: SplitName) -> NDArray[np.unsignedinteger[Any]]:
        """Map the tokens of a split, shape (tokens,), into memory."""
        return np.memmap(self.file(name), dtype=self.dtype, mode="r")

    def token_counts(self, name: SplitName) -> NDArray[np.int64]:
        """Count each token id of a split, shape (vocab_size,); exact, in little memory.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        tokens = self.tokens(name)
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _COUNTED_AT_ONCE):
            part = np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=self.vocab_size)
            if len(part) > self.vocab_size:
                raise InputError(
                    f"data_dir: {self.file(name)} holds id {len(part) - 1}, outside its vocabulary "
                    f"of {self.vocab_size}; run `moezoo prepare --output {self.directory}`"
                )
            counts += part
        return counts

    def __str__(self) -> str:
        """Describe the data in one line."""
        sizes = ", ".join(
            f"{name} {size.documents:,} documents, {size.tokens:,} tokens, {size.bytes:,} bytes"
            for name, size in (("train", self.train), ("val", self.val))
        )
        return (
            f"{self.directory} ({sizes}; vocabulary {self.vocab_size:,}, "
            f"{self.bytes_per_token:.2f} bytes per token)"
        )


def check_place(directory: Path) -> None:
    """See that no folder is in the way of a file that is to be written there.

    Raises:
        InputError: names the folder.
    """
    for name in (META_FILE, "train.bin", "val.bin", "train.marks", "val.marks"):
        if (directory / name).is_dir():
            raise InputError(f"output: {directory / name} is a folder; remove it")


def _split(values: Any) -> Split:
    return Split(**{name: _count(value) for name, value in _of_kind(values, dict).items()})


def _count(value: Any) -> int:
    if _of_kind(value, int) < 0 or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is no count")
    return int(value)


def _of_kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.60} is of the wrong kind")
    return value


def _sum(meta: dict[str, Any]) -> int:
    """Return the checksum of what ``meta.json`` says besides it."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest stored type that holds every id below ``vocab_size``."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def hash_folder(folder: Path) -> str:
    """Hash the names and bytes of the files in a folder (not in its subfolders)."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.is_file():
            total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
