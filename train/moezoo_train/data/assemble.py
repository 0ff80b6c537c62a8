"""Encoded documents as two splits: which are held out, and one file for each split."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_train.data.cutting import Cut
from moezoo_train.data.prepared import SCORED, Split, SplitName
from moezoo_train.data.shards import Shard


def assemble(
    folder: Path, shards: Sequence[Shard], val_fraction: float, cut: Cut | None = None
) -> tuple[Split, Split]:
    """Copy shards into one file per split, in ``folder``, and one for the marks if there are any.

    Args:
        folder: where the files are written.
        shards: all of them, in order.
        val_fraction: share of the documents that is held out.
        cut: the only document that is held out, and only in part.

    Returns:
        How much there is to train on and to validate on.

    Raises:
        InputError: one of the two splits would be empty.
    """
    described = [shard.documents() for shard in shards]
    everything = np.concatenate(described)
    threshold = split_threshold(everything["key"], val_fraction) if cut is None else cut.key
    kinds = ("bin", "marks") if shards[0].marked else ("bin",)
    names: tuple[SplitName, ...] = ("train", "val")
    with ExitStack() as stack:
        files: dict[tuple[SplitName, str], _Summed] = {
            (name, kind): stack.enter_context(_Summed(folder / f"{name}.{kind}"))
            for name in names
            for kind in kinds
        }
        for shard, documents in zip(shards, described, strict=True):
            contents = {"bin": shard.tokens(), **({"marks": shard.marks()} if shard.marked else {})}
            for start, end, held_out in _runs(documents, threshold):
                if held_out and cut is not None:
                    continue
                name: SplitName = "val" if held_out else "train"
                for kind, content in contents.items():
                    files[name, kind].write(content[start:end])
        in_val = everything["key"] <= threshold
        measured = {"train": everything[~in_val], "val": everything[in_val]}
        if cut is not None:
            whole, equal = everything[~in_val], everything[in_val]
            for name, part in cut.parts.items():
                files[name, "bin"].write(np.tile(part.tokens, len(equal)))
                parts = equal.copy()
                parts["tokens"], parts["bytes"] = len(part.tokens), part.bytes
                measured[name] = parts if name == "val" else np.concatenate([whole, parts])
    train, val = (
        _measure(measured[name], files[name, "bin"], files.get((name, "marks"))) for name in names
    )
    return train, val


class _Summed:
    """A file that is written, with the checksum of what was, and the number of scored marks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.crc32 = 0
        self.scored = 0

    def __enter__(self) -> _Summed:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: NDArray[Any]) -> None:
        self.crc32 = zlib.crc32(content.data, self.crc32)
        if content.dtype == np.uint8:
            self.scored += int(np.count_nonzero(content & SCORED))
        self._file.write(content.data)


def _runs(documents: NDArray[Any], threshold: np.uint64) -> Iterator[tuple[int, int, bool]]:
    """Yield the first and the last token, exclusive, of consecutive documents of one split."""
    in_val = documents["key"] <= threshold
    ends = np.cumsum(documents["tokens"])
    last = np.append(np.flatnonzero(in_val[1:] != in_val[:-1]), len(documents) - 1)
    start = 0
    for end, held_out in zip(ends[last].tolist(), in_val[last].tolist(), strict=True):
        yield start, end, held_out
        start = end


def split_threshold(keys: NDArray[np.uint64], val_fraction: float) -> np.uint64:
    """Return the key up to which documents are held out.

    A document's key is a hash of its text and the seed; the smallest ``val_fraction`` of the keys,
    at least one, are held out. Equal documents have equal keys and so never end up on both sides.

    Raises:
        InputError: one of the two splits would be empty.
    """
    count = max(1, round(val_fraction * len(keys)))
    if len(np.unique(keys)) < 2:
        raise InputError(
            "source: training and validation need at least two different documents; "
            f"this has {len(keys)}; give more"
        )
    threshold = np.partition(keys, count - 1)[count - 1]
    if threshold == keys.max():
        raise InputError(
            f"val_fraction: {val_fraction} of {len(keys)} documents leaves none to train on; "
            "lower it"
        )
    return np.uint64(threshold)


def _measure(documents: NDArray[Any], tokens: _Summed, marks: _Summed | None) -> Split:
    return Split(
        documents=len(documents),
        tokens=int(documents["tokens"].sum()),
        bytes=int(documents["bytes"].sum()),
        crc32=tokens.crc32,
        scored=None if marks is None else marks.scored,
        marks_crc32=None if marks is None else marks.crc32,
    )
