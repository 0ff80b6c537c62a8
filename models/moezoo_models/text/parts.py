"""Parts of files of text that are read alone, wherever in a file they are.

A part of a ``.txt`` or ``.jsonl`` file holds the lines that begin between two bytes, one of a
``.parquet`` file some rows of a row group. All parts together hold every line and row once.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from moezoo.errors import InputError
from moezoo_models.text.corpus import FileCorpus
from moezoo_models.text.plain import LONGEST_STRETCH, read_whole, reading, stretches
from moezoo_models.text.rows import field_of, read_parquet, row_groups, row_of

WHOLE_BYTES = 1 << 20
"""Up to this size a ``.txt`` file of a folder or glob is one document."""


class Part(NamedTuple):
    """Where a part of a corpus is.

    Attributes:
        file: number of the file.
        group: of a table the row group, else 0.
        begin: first byte, or row of the group.
        end: one behind the last.
    """

    file: int
    group: int
    begin: int
    end: int


def measure(corpus: FileCorpus) -> list[list[tuple[int, int]]]:
    """Return how much each file holds, and each of its row groups: bytes or rows, and text bytes.

    Raises:
        InputError: a file cannot be read, or a table has no such column.
    """
    found = []
    for file in corpus.files:
        with reading(file):
            if file.suffix == ".parquet":
                found.append(row_groups(file, corpus.text_field))
            else:
                size = file.stat().st_size
                found.append([(size, size)])
    return found


def cut(corpus: FileCorpus, sizes: list[list[tuple[int, int]]], size: int) -> list[Part]:
    """Cut files into parts of about so many bytes of text, in their order.

    Args:
        corpus: the files.
        sizes: of :func:`measure`.
        size: bytes; a small text file of several stays whole.
    """
    parts = []
    for number, (file, groups) in enumerate(zip(corpus.files, sizes, strict=True)):
        for group, (units, text_bytes) in enumerate(groups):
            count = max(1, -(-text_bytes // size))
            if file.suffix == ".txt" and not corpus.split and text_bytes <= WHOLE_BYTES:
                count = 1
            ends = [units * k // count for k in range(count + 1)]
            parts += [
                Part(number, group, begin, end) for begin, end in pairwise(ends) if begin < end
            ]
    return parts


def read_part(corpus: FileCorpus, part: Part) -> Iterator[str]:
    """Yield the non-empty documents of a part.

    Raises:
        InputError: the file is not readable as text, or a row lacks the text field.
    """
    file, begin, end = corpus.files[part.file], part.begin, part.end
    with reading(file):
        if file.suffix == ".parquet":
            found = read_parquet(file, corpus.text_field, part=(part.group, begin, end))
        elif file.suffix == ".jsonl":
            found = _rows(file, corpus.text_field, begin, end)
        elif not corpus.split and begin == 0 and end == file.stat().st_size:
            found = iter([read_whole(file)])
        else:
            found = stretches(file, _texts(file, begin, end))
        yield from filter(None, found)


def _rows(file: Path, text_field: str, begin: int, end: int) -> Iterator[str]:
    for place, line in _lines(file, begin, end):
        text = line.decode("utf-8-sig" if place == 0 else "utf-8")
        if text.strip():
            where = f"{file} at byte {place}"
            yield field_of(row_of(text, where), text_field, where)


def _texts(file: Path, begin: int, end: int) -> Iterator[str]:
    """Yield lines, long ones in pieces, which may end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if begin == 0 else "utf-8")()
    for _, line in _lines(file, begin, end, LONGEST_STRETCH):
        yield decoder.decode(line)
    decoder.decode(b"", final=True)


def _lines(file: Path, begin: int, end: int, longest: int = -1) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in [begin, end), with the place of each; long ones in pieces."""
    with file.open("rb") as stream:
        if begin:
            stream.seek(begin - 1)
            while (rest := stream.readline(LONGEST_STRETCH)) and not rest.endswith(b"\n"):
                pass
        place, opens = stream.tell(), True
        while not (opens and place >= end) and (line := stream.readline(longest)):
            yield place, line
            place += len(line)
            opens = line.endswith(b"\n")


def files_of(corpus: object, source: str) -> FileCorpus:
    """Return a corpus that is made of files of text.

    Raises:
        InputError: it is not.
    """
    if not isinstance(corpus, FileCorpus) or corpus.skip_unreadable:
        raise InputError(
            f"source: {source} is not made of files, which alone are streamed; give .txt, .jsonl "
            "or .parquet files, or prepare it"
        )
    return corpus
