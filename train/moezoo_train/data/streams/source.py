"""One text that is streamed: its parts, in which order they are read, and what is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moezoo.errors import InputError, check_int, check_number
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.parts import Part, cut, files_of, measure, read_part
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.data.encoders import Encoders, EncodingError
from moezoo_train.data.prepared import token_dtype
from moezoo_train.data.windows import generator_of

PART_BYTES = 1 << 18
"""Text of a part, or less where there is little of it."""
BLOCK_PARTS = 16
"""Parts from all over a text whose windows are shuffled together."""


class HeldOut(NamedTuple):
    """Documents that are validated on.

    Attributes:
        tokens: their ids, one behind the other, ``(tokens,)``.
        bytes: length of their text in UTF-8.
    """

    tokens: NDArray[Any]
    bytes: int


class StreamedText:
    """Files of text in parts, dealt to readers.

    A document is held out, and never trained on, by a hash of its own: which ones are does not
    depend on anything else.

    Args:
        path: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder or a glob of those.
        text_field: field of a row that holds its text.
        tokenizer: directory of the tokenizer, or "hf:NAME".
        readers: L, among whom the parts are dealt.
        seed: chooses who reads what, and in which order.
        val_fraction: share of the documents that is held out.
        split_seed: chooses which.

    Raises:
        InputError: there are no such files, or less text than readers; a setting is out of range.
    """

    def __init__(
        self,
        path: str,
        text_field: str,
        tokenizer: str,
        readers: int,
        seed: int,
        val_fraction: float,
        split_seed: int,
    ) -> None:
        self.path = path
        self.corpus = files_of(open_corpus(path, text_field), path)
        self.readers = check_int("stream_readers", readers)
        self.seed = check_int("seed", seed, minimum=0)
        self.val_fraction = check_number("val_fraction", val_fraction, maximum=0.99)
        self.split_seed = check_int("split_seed", split_seed, minimum=0, maximum=(1 << 63) - 1)
        if not val_fraction:
            raise InputError("val_fraction: 0 holds nothing out to validate on; give e.g. 0.001")
        self._tokenizer_name = tokenizer
        self._sizes = measure(self.corpus)
        total = sum(size for groups in self._sizes for _, size in groups)
        size = min(PART_BYTES, max(1, total // (readers * BLOCK_PARTS)))
        self.parts = cut(self.corpus, self._sizes, size)
        if len(self.parts) < readers:
            raise InputError(
                f"stream_readers: {path} has {len(self.parts)} parts, too few for {readers} "
                "readers; lower it, or prepare the text (stream false)"
            )
        self._key = int(split_seed).to_bytes(8, "little")
        self._limit = int(val_fraction * 2**64)

    def __getstate__(self) -> dict[str, Any]:
        """Have each process load the tokenizer itself."""
        state = self.__dict__.copy()
        state.pop("tokenizer", None)
        return state

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What encodes."""
        return load_tokenizer(self._tokenizer_name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type that every id fits into."""
        return token_dtype(self.tokenizer.vocab_size)

    @cached_property
    def _dealt(self) -> torch.Tensor:
        return torch.randperm(len(self.parts), generator=generator_of(self.seed, -1))

    def fingerprint(self) -> str:
        """Return a hash of all that decides which tokens come when, but for the files' content."""
        known = {
            "names": [file.relative_to(self.corpus.root).as_posix() for file in self.corpus.files],
            "sizes": self._sizes,
            "text_field": self.corpus.text_field,
            "split": self.corpus.split,
            "tokenizer": self.tokenizer.fingerprint(),
            "val_fraction": self.val_fraction,
            "split_seed": self.split_seed,
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def order(self, reader: int, epoch: int) -> list[int]:
        """Return the numbers of the parts that a reader reads in an epoch: always the same ones."""
        own = self._dealt[reader :: self.readers]
        generator = generator_of(self.seed, reader, epoch, -1)
        return [int(part) for part in own[torch.randperm(len(own), generator=generator)]]

    def blocks(self, reader: int) -> int:
        """Return how many blocks of parts a reader's share is."""
        return -(-len(self._dealt[reader :: self.readers]) // BLOCK_PARTS)

    def training_tokens(self, part: int) -> NDArray[Any]:
        """Return the ids of a part's documents that are not held out, ends included.

        Raises:
            InputError: the part cannot be read, or not be encoded.
        """
        place = self.parts[part]
        return self._encode(place, (text for text in self._read(place) if not self._is_held(text)))

    def held_out(self, num_bytes: int) -> HeldOut:
        """Return the first documents that are held out, of about so many bytes.

        Raises:
            InputError: there are none.
        """
        found: list[NDArray[Any]] = []
        size = 0
        for part in self.parts:
            texts = [text for text in self._read(part) if self._is_held(text)]
            if texts:
                found.append(self._encode(part, texts))
                size += sum(len(text.encode()) for text in texts)
            if size >= num_bytes:
                break
        if not found:
            raise InputError(
                f"val_fraction: {self.val_fraction:g} holds out nothing of {self.path}; raise it"
            )
        return HeldOut(np.concatenate(found), size)

    def name_of(self, part: int) -> str:
        """Return where a part is, for messages."""
        file, group, begin, end = self.parts[part]
        where = self.corpus.files[file]
        if where.suffix == ".parquet":
            return f"rows {begin + 1} to {end} of row group {group + 1} of {where}"
        return f"bytes {begin} to {end} of {where}"

    def _read(self, part: Part) -> Iterator[str]:
        return read_part(self.corpus, part)

    def _is_held(self, text: str) -> bool:
        digest = blake2b(text.encode(), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") < self._limit

    def _encode(self, part: Part, texts: Iterable[str]) -> NDArray[Any]:
        try:
            return Encoders(self.tokenizer, 1).here(list(texts))
        except EncodingError as error:
            file = self.corpus.files[part.file]
            raise InputError(
                f"tokenizer: it cannot encode a document of {file} between {part.begin} and "
                f"{part.end}: {error.reason}; leave that text out, or give another tokenizer"
            ) from error
