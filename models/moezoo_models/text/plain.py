"""Text files: in UTF-8 and without NUL bytes, whole or in stretches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moezoo.errors import InputError

STRETCH_CHARACTERS = 4_000
"""A single text file is cut at the first blank line behind this many characters …"""
LONGEST_STRETCH = 16_000
"""… and at this many where there is none."""

_MARKS = {
    b"\xff\xfe\0\0": "it is UTF-32",
    b"\0\0\xfe\xff": "it is UTF-32",
    b"\xff\xfe": "it is UTF-16",
    b"\xfe\xff": "it is UTF-16",
}


def announced_encoding(content: bytes) -> str | None:
    """Return which encoding the first bytes of a file announce, if it is UTF-16 or UTF-32."""
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)


def reason_of(error: OSError) -> str:
    """Return why a file cannot be read: libraries raise errors of the system without its words."""
    return error.strerror or str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what may be wrong with a file of text into one line.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        with file.open("rb") as stream:
            problem = announced_encoding(stream.read(4)) or error.reason
        raise InputError(
            f"source: {file} is not UTF-8 text ({problem}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"source: {file} cannot be read: {reason_of(error)}") from error


def read_whole(file: Path) -> str:
    """Read a text file as one document."""
    return _checked_text(file, file.read_bytes().decode("utf-8-sig"))


def stretches(file: Path, lines: Iterable[str]) -> Iterator[str]:
    """Cut the lines of a text file behind blank ones, without holding all of it in memory.

    Args:
        file: for messages.
        lines: with their ends; longer ones than LONGEST_STRETCH in pieces.
    """
    stretch: list[str] = []
    length = 0
    for line in lines:
        stretch.append(_checked_text(file, line))
        length += len(line)
        ends = length >= STRETCH_CHARACTERS and not line.strip()
        if ends or length >= LONGEST_STRETCH:
            yield "".join(stretch)
            stretch, length = [], 0
    yield "".join(stretch)


def _checked_text(file: Path, text: str) -> str:
    if "\0" in text:
        raise InputError(f"source: {file} is a binary file (it holds NUL bytes); give a text file")
    return text
