"""Replacing files and directories: there is always the old one or the new one, no mixture."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moezoo.atomic import atomic_write

__all__ = ["atomic_write", "publish", "remove_leftovers", "replacing_directory"]

_CURRENT_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """Give a fresh directory to fill, which takes the place of ``target`` at the end.

    The fresh directory is a hidden sibling. If the block raises, it is removed and ``target`` stays
    as it was.

    Args:
        target: the directory to make or replace; its parents are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        publish(fresh, target)
    finally:
        # What is incomplete.
        shutil.rmtree(fresh, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside a file or directory that they were writing.

    Nobody else may be writing it. Killed between :func:`publish`'s two renames, ``target`` gets its
    earlier content back.
    """
    for old in target.parent.glob(f".{target.name}.old-*"):
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for fresh in target.parent.glob(f".{target.name}.new-*"):
        shutil.rmtree(fresh)
    target.with_name(f".{target.name}.tmp").unlink(missing_ok=True)


def publish(fresh: Path, target: Path) -> None:
    """Put a complete directory in the place of ``target``, and remove what was there.

    The two are exchanged in one system call where Linux and the file system have it; elsewhere by
    two renames, between which a crash leaves the old one as ``.NAME.old-…``.
    """
    _flush(fresh)
    if not target.exists():
        fresh.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    if _exchange(fresh, target):
        fresh.rename(old)
    else:
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Force file contents to disk, lest a power cut keep the rename and lose the data."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False if the system can not."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    failed = rename(_CURRENT_DIRECTORY, paths[0], _CURRENT_DIRECTORY, paths[1], _EXCHANGE)
    return not failed
