"""Rows of JSON lines and of parquet tables, and the text in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moezoo.errors import InputError, nearest
from moezoo_models.text.conversations import conversation_of


def read_jsonl(file: Path, text_field: str, messages: bool = False) -> Iterator[str]:
    """Yield the text of each row of JSON lines, or its conversation as JSON if ``messages``.

    Raises:
        InputError: names the line that cannot be read.
    """
    read = conversation_of if messages else field_of
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            yield read(row_of(line, place), text_field, place)


def row_of(line: str, place: str) -> Any:
    """Return the row that a line of JSON holds.

    Args:
        line: not blank.
        place: where it is, for messages.

    Raises:
        InputError: it is not JSON, or not to be read.
    """
    try:
        return json.loads(line, object_pairs_hook=_without_doubles)
    # Integers of thousands of digits are refused by Python, as is very deep nesting.
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"source: {place} is not JSON to be read: {reason}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return row


def field_of(row: Any, text_field: str, place: str) -> str:
    """Return the text of a row; empty if it has none.

    Args:
        row: what was read.
        text_field: name of the field.
        place: where the row is, for messages.

    Raises:
        InputError: the row has no such field, or no text in it.
    """
    if not isinstance(row, dict):
        raise InputError(f"source: {place} is not an object with a {text_field!r} field")
    if text_field not in row:
        raise InputError(f"text_field: {place} has no {text_field!r}{nearest(text_field, row)}")
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"text_field: {text_field!r} in {place} is a {type(text).__name__}, not text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"source: {place} holds half a surrogate pair, which is no character; repair the row"
        ) from error
    return text


def row_groups(file: Path, text_field: str) -> list[tuple[int, int]]:
    """Return the number of rows and the bytes of text of each row group of a table.

    Raises:
        InputError: the table is damaged, or has no such column.
    """
    with _opened(file, text_field) as table:
        names = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
        column = names.index(text_field) if text_field in names else 0
        groups = [table.metadata.row_group(g) for g in range(table.metadata.num_row_groups)]
        return [(g.num_rows, g.column(column).total_uncompressed_size) for g in groups]


def read_parquet(
    file: Path,
    text_field: str,
    messages: bool = False,
    part: tuple[int, int, int] | None = None,
) -> Iterator[str]:
    """Yield what :func:`read_jsonl` does, of a table; pages with a checksum are compared with it.

    Args:
        file: the table.
        text_field: the column.
        messages: whether it holds conversations.
        part: a row group, its first row to be read and the one behind the last; None for all.

    Raises:
        InputError: the table is damaged, or has no text in that column.
    """
    read = conversation_of if messages else field_of
    with _opened(file, text_field, messages) as table:
        groups = None if part is None else [part[0]]
        first, last = (0, -1) if part is None else part[1:]
        before = sum(table.metadata.row_group(g).num_rows for g in range(part[0] if part else 0))
        number = 0
        for batch in table.iter_batches(1024, groups, [text_field]):
            rows = batch.slice(min(max(first - number, 0), batch.num_rows))
            number += batch.num_rows - rows.num_rows
            for row in rows.to_pylist():
                if number == last:
                    return
                number += 1
                yield read(row, text_field, f"{file} row {before + number}")


@contextmanager
def _opened(file: Path, text_field: str, messages: bool = False) -> Iterator[Any]:
    """Open a table that has a column, and say what is wrong with it in one line.

    Raises:
        InputError: the table is damaged, or has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"source: {file} needs `pip install 'moezoo[data]'` (pyarrow)") from error
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
            if text_field not in table.schema_arrow.names:
                choices = nearest(text_field, table.schema_arrow.names)
                option = "messages_field" if messages else "text_field"
                raise InputError(f"{option}: {file} has no column {text_field!r}{choices}")
            yield table
    except InputError:
        raise
    # Of damaged pages it raises errors of the system as well, and bare ones of its own.
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"source: {file} is not a parquet file, or is damaged: {reason}"
        ) from error
