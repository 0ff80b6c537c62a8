"""Encoded documents as two splits: which are held out, and one file for each split."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_models.files.checksums import crc_of_file
from moezoo_train.data.prepared import SCORED, Split, SplitName
from moezoo_train.data.shards import Shard


def assemble(folder: Path, shards: Sequence[Shard], val_fraction: float) -> tuple[Split, Split]:
    """Copy shards into one file per split, in ``folder``, and one for the marks if there are any.

    Args:
        folder: where the files are written.
        shards: all of them, in order.
        val_fraction: share of the documents that is held out.

    Returns:
        How much there is to train on and to validate on.

    Raises:
        InputError: one of the two splits would be empty.
    """
    described = [shard.documents() for shard in shards]
    everything = np.concatenate(described)
    threshold = split_threshold(everything["key"], val_fraction)
    held_out = everything["key"] <= threshold
    scored: dict[SplitName, int] = {"train": 0, "val": 0}
    with ExitStack() as stack:
        kinds = ("bin", "marks") if shards[0].marked else ("bin",)
        files = {
            f"{name}.{kind}": stack.enter_context((folder / f"{name}.{kind}").open("wb"))
            for name in scored
            for kind in kinds
        }
        for shard, documents in zip(shards, described, strict=True):
            in_val = np.repeat(documents["key"] <= threshold, documents["tokens"])
            for name, chosen in _both(in_val):
                files[f"{name}.bin"].write(shard.tokens()[chosen].tobytes())
                if shard.marked:
                    marks = shard.marks()[chosen]
                    files[f"{name}.marks"].write(marks.tobytes())
                    scored[name] += int(np.count_nonzero(marks & SCORED))
    marked = shards[0].marked
    train, val = (
        _measure(folder, name, everything[chosen], scored[name] if marked else None)
        for name, chosen in _both(held_out)
    )
    return train, val


def _both(held_out: NDArray[np.bool_]) -> list[tuple[SplitName, NDArray[np.bool_]]]:
    """Return each split with what belongs to it."""
    return [("train", ~held_out), ("val", held_out)]


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
            f"this has {len(keys)}"
        )
    threshold = np.partition(keys, count - 1)[count - 1]
    if threshold == keys.max():
        raise InputError(
            f"val_fraction: {val_fraction} of {len(keys)} documents leaves none to train on; "
            "lower it"
        )
    return np.uint64(threshold)


def _measure(folder: Path, name: SplitName, documents: NDArray[Any], scored: int | None) -> Split:
    return Split(
        documents=len(documents),
        tokens=int(documents["tokens"].sum()),
        bytes=int(documents["bytes"].sum()),
        crc32=crc_of_file(folder / f"{name}.bin"),
        scored=scored,
        marks_crc32=None if scored is None else crc_of_file(folder / f"{name}.marks"),
    )
