"""Writing a file so that there is always the old one or the new one, never half of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of the errors by which a system says that a file cannot grow."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of ``path`` that takes its name once it is safely on disk.

    A reader sees the old file or the new one, also after a crash; an exception inside leaves the
    old one. Text is UTF-8.

    Raises:
        OSError: names ``path``, also where the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed process left behind is overwritten, not collected.
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with (
            named_errors(target),
            open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file,
        ):
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in errors of the system that name none, as when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
