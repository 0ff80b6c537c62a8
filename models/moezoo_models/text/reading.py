"""Text files as strings."""

from __future__ import annotations

from pathlib import Path

from moezoo.errors import InputError
from moezoo_models.text.plain import announced_encoding


def read_text(file: Path) -> str:
    """Read a file that must be text, all of it but a byte order mark.

    Raises:
        InputError: it is missing, empty, or not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"text: {file} cannot be read: {error.strerror}; give a text file"
        ) from error
    if not content:
        raise InputError(f"text: {file} is empty; give a file with text in it")
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = announced_encoding(content) or f"byte {error.start}"
        raise InputError(
            f"text: {file} is not UTF-8 text ({problem}); give a text file in UTF-8"
        ) from error
    if "\0" in decoded:
        raise InputError(f"text: {file} is binary: it holds zero bytes; give a text file")
    return decoded
