"""Encoded documents on their way to disk, in shards that are either complete or not there."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_train.data.encoders import Encoded

_DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("key", "<u8")])
"""Fields kept of each document: its lengths, and the key by which the split is made."""


class Shard:
    """The tokens of a run of documents; it is there once its index file is.

    Args:
        folder: where shards are.
        number: its place in the corpus.
        dtype: type of the stored ids.
        marked: whether each token has a mark beside its id.
    """

    def __init__(
        self, folder: Path, number: int, dtype: np.dtype[Any], marked: bool = False
    ) -> None:
        self.marked = marked
        self._marks_file = folder / f"shard-{number:06d}.marks"
        self._token_file = folder / f"shard-{number:06d}.bin"
        self._index_file = folder / f"shard-{number:06d}.index"
        self._dtype = dtype

    def complete(self) -> bool:
        """Return whether it was written to the end."""
        if not (self._token_file.is_file() and self._index_file.is_file()):
            return False
        if self._index_file.stat().st_size % _DOCUMENT.itemsize:
            return False
        tokens = int(self.documents()["tokens"].sum())
        if self.marked and not self._marks_file.is_file():
            return False
        if self.marked and self._marks_file.stat().st_size != tokens:
            return False
        return self._token_file.stat().st_size == tokens * self._dtype.itemsize

    def documents(self) -> NDArray[Any]:
        """Return tokens, bytes and key of each document, as a structured array."""
        return np.frombuffer(self._index_file.read_bytes(), dtype=_DOCUMENT)

    def tokens(self) -> NDArray[Any]:
        """Return the ids of all documents, shape (tokens,)."""
        return np.frombuffer(self._token_file.read_bytes(), dtype=self._dtype)

    def marks(self) -> NDArray[np.uint8]:
        """Return the marks of all tokens, shape (tokens,)."""
        return np.frombuffer(self._marks_file.read_bytes(), dtype=np.uint8)

    def write(self, encoded: Encoded, described: list[tuple[int, int]]) -> None:
        """Write encoded documents, with the length in bytes and the key of each."""
        index = np.zeros(len(described), _DOCUMENT)
        index["tokens"] = encoded.lengths
        index["bytes"] = [size for size, _ in described]
        index["key"] = np.array([key for _, key in described], np.uint64)
        contents = [(self._token_file, encoded.tokens), (self._index_file, index)]
        if encoded.marks is not None:
            contents.insert(0, (self._marks_file, encoded.marks))
        for path, content in contents:
            with atomic_write(path) as file:
                file.write(content.tobytes())


class Batch:
    """The documents of one shard, read and described as they are iterated over, once.

    Args:
        documents: read up to that with which they reach ``size`` bytes.
        size: in bytes of UTF-8.
        seed: of the documents' keys.

    Attributes:
        described: the length in bytes and the key of each document that was read.
    """

    def __init__(self, documents: Iterator[str], size: int, seed: int) -> None:
        self._documents = documents
        self._size = size
        self._seed = seed.to_bytes(8, "little")
        self.described: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[str]:
        held = 0
        for document in self._documents:
            data = document.encode()
            key = blake2b(data, digest_size=8, key=self._seed).digest()
            self.described.append((len(data), int.from_bytes(key, "little")))
            yield document
            held += len(data)
            if held >= self._size:
                return


def batches(documents: Iterator[str], size: int, seed: int) -> Iterator[Batch]:
    """Group documents into batches of at least ``size`` bytes, each to be read before the next."""
    for first in documents:
        yield Batch(chain([first], documents), size, seed)
