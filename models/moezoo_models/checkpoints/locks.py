"""One writer at a time: locks of what is about to be made or replaced.

They are locks of the operating system, so they end with their process, however that ends.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moezoo.atomic import NO_ROOM
from moezoo.errors import InputError

_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

_held: set[Path] = set()
"""The locks that this process holds."""


@contextmanager
def writing(target: str | Path, field: str = "output", *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a file or directory, which need not be there yet.

    A process may take a lock again that it holds. The lock is an empty file, ``.NAME.lock`` beside
    the target, or in it where the folder around it is not writable: never a part of the target.
    It goes with the block, as do the folders that were made for it and stayed empty, the target
    among them where the block was refused; after a ``kill -9`` it stays and holds nobody up.

    Args:
        target: the file or directory.
        field: the option that names it, for messages.
        wait: wait for another process, and say so, instead of refusing.

    Raises:
        InputError: another process is writing it, or nothing can be written there.
        OSError: of a full disk, names the target if not a file of it.
    """
    place = Path(os.path.realpath(target))
    if place in _held:
        yield
        return
    new = not place.exists()
    made = [folder for folder in place.parents if not folder.exists()]
    lock = _acquire(place, Path(target), field, wait)
    _held.add(place)
    try:
        with _named(target):
            yield
    except BaseException:
        made = [place, *made] if new else made
        raise
    finally:
        _held.discard(place)
        if lock is not None:
            # First: whoever takes the lock of a file without a name begins again with a new one.
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _named(target: str | Path) -> Iterator[None]:
    """Name the target where the system says that there is no room, and not for which file."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = os.fspath(target)
        raise


def _acquire(place: Path, shown: Path, field: str, wait: bool) -> FileLock | None:
    beside, within = place.with_name(f".{place.name}.lock"), place / ".lock"
    path = beside if place.name else within
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _lock(path, shown, field, wait)
        except OSError as error:
            if error.errno not in _FORBIDDEN or not place.is_dir():
                raise
            return _lock(within, shown, field, wait)
    except OSError as error:
        # The message of mkdir about a file where it expects a folder misleads.
        missing = isinstance(error, FileExistsError)
        reason = os.strerror(errno.ENOTDIR) if missing else error.strerror
        raise InputError(
            f"{field}: {shown} cannot be written: {reason}; free space or give another "
            "directory, then run this again"
        ) from error


def _lock(path: Path, shown: Path, field: str, wait: bool) -> FileLock | None:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise InputError(
                    f"{field}: another process is writing {shown}; wait for its end, or name "
                    "another"
                ) from None
            print(f"waiting for another process that writes {shown}", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise
        print(
            f"moezoo: warning: {path.parent} has no locks; let no other process write {shown}",
            file=sys.stderr,
            flush=True,
        )
        return None
    return lock


def check_file(file: str | Path, field: str = "output") -> None:
    """Refuse a place in which no file can be written, before what it is for is computed.

    Raises:
        InputError: it is a folder, or the folder that it is to be in cannot be written.
    """
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{field}: {path} is a folder; give a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "cannot be written to" if folder.is_dir() else "is a file"
        raise InputError(f"{field}: {path} cannot be written: {folder} {reason}; give another file")
