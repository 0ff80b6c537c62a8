"""Replacing files and directories: there is always the old one or the new one, no mixture."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moezoo.atomic import atomic_write, named_errors
from moezoo_models.checkpoints.locks import writing

__all__ = [
    "atomic_write",
    "is_there",
    "publish",
    "remove_leftovers",
    "replacing_directory",
    "replacing_file",
]

_CURRENT_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


@contextmanager
def replacing_directory(target: Path, field: str = "output") -> Iterator[Path]:
    """Yield a fresh directory to fill, which takes the place of ``target`` at the end.

    The fresh directory is a hidden sibling. If the block raises, it is removed and ``target`` stays
    as it was. Leftovers of processes that were killed here are removed first.

    Args:
        target: the directory to make or replace; its parents are made.
        field: the option that names it, for messages.

    Raises:
        InputError: another process is writing it.
    """
    with writing(target, field):
        remove_leftovers(target)
        fresh = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
        fresh.mkdir()
        try:
            yield fresh
            publish(fresh, target)
        finally:
            # Published, it is gone; else it is incomplete.
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def replacing_file(target: Path, field: str = "output") -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of ``target`` at the end.

    For writers that want a path; others use :func:`moezoo.atomic.atomic_write`. If the block
    raises, what was written is removed and ``target`` stays as it was.

    Args:
        target: the file to make or replace; its parents are made.
        field: the option that names it, for messages.

    Raises:
        InputError: another process is writing it.
        OSError: names ``target``, also where the disk is full.
    """
    with writing(target, field), named_errors(target):
        remove_leftovers(target)
        fresh = target.with_name(f".{target.name}.tmp")
        try:
            yield fresh
            with fresh.open("rb") as handle:
                os.fsync(handle.fileno())
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside a file or directory that they were writing.

    Nobody else may be writing it. Killed between :func:`publish`'s two renames, ``target`` gets its
    earlier content back.
    """
    for old in _siblings(target, "old"):
        if os.path.lexists(target):
            _remove(old)
        else:
            old.rename(target)
    for fresh in _siblings(target, "new"):
        _remove(fresh)
    target.with_name(f".{target.name}.tmp").unlink(missing_ok=True)


def is_there(target: Path) -> bool:
    """Return whether a file or directory exists, or would after :func:`remove_leftovers`."""
    # In this order: another process may be giving it back.
    return bool(_siblings(target, "old")) or target.exists()


def publish(fresh: Path, target: Path) -> None:
    """Put a complete file or directory in the place of ``target``, and remove what was there.

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
    with suppress(OSError):
        _remove(old)


def _siblings(target: Path, kind: str) -> list[Path]:
    """List the hidden siblings that :func:`publish` and its callers name after a target."""
    if not target.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]{{8}}")
    return [path for path in sorted(target.parent.iterdir()) if name.fullmatch(path.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(directory: Path) -> None:
    """Force file contents to disk, lest a power cut keep the rename and lose the data."""
    for file in (directory, *directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False if the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    failed = rename(_CURRENT_DIRECTORY, paths[0], _CURRENT_DIRECTORY, paths[1], _EXCHANGE)
    return not failed
