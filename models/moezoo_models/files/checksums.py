"""Checksums of files that are read again much later, against bytes that a disk or a copy changed.

All are CRC-32, which finds every change of up to 32 bits in a row. They protect from accidents, not
from people.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

_FIELD = "crc32"
_METADATA = "__metadata__"
_AT_ONCE = 1 << 24


def crc_of(file: IO[bytes], start: int = 0) -> int:
    """Return the checksum of the rest of a file.

    Args:
        file: open, in binary mode.
        start: checksum of what comes before.
    """
    while part := file.read(_AT_ONCE):
        start = zlib.crc32(part, start)
    return start


def crc_of_file(path: Path) -> int:
    """Return the checksum of a whole file."""
    with path.open("rb") as file:
        return crc_of(file)


def check_archive(path: str | Path) -> None:
    """Check that a file of ``torch.save`` is as it was written: ``torch.load`` does not look.

    Raises:
        ValueError: a part of it has another checksum than it says, or it is no such file.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if bad is not None:
        raise ValueError(f"the checksum of {bad} is wrong")


def seal(path: Path) -> None:
    """Write the checksum of a safetensors file into its header.

    It travels with the file, and vanishes when another program writes the file anew.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        start = file.tell()
        total = crc_of(file, sum_of_header(header))
        sealed = path.with_name(f"{path.name}.sealed")
        with sealed.open("wb") as target:
            target.write(sealed_header(header, total))
            file.seek(start)
            while part := file.read(_AT_ONCE):
                target.write(part)
    os.replace(sealed, path)


def sealed_header(header: dict[str, Any], total: int) -> bytes:
    """Encode the header of a safetensors file, its length before it.

    Args:
        header: what it says.
        total: the checksum to write into it, which does not change its length: that of the tensors,
            in the order of the file, begun with :func:`sum_of_header`.
    """
    metadata = {**header.get(_METADATA, {}), _FIELD: f"{total:08x}"}
    text = json.dumps({**header, _METADATA: metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def sum_of_header(header: dict[str, Any]) -> int:
    """Return the checksum of a header, of all but the checksum that it may hold."""
    metadata = {n: value for n, value in header.get(_METADATA, {}).items() if n != _FIELD}
    return zlib.crc32(json.dumps({**header, _METADATA: metadata}, sort_keys=True).encode())


def check_seal(path: Path) -> None:
    """See that a safetensors file is what :func:`seal` saw; others pass.

    Raises:
        ValueError: it is not, or its header cannot be read.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        written = header.get(_METADATA, {}).get(_FIELD)
        if written is not None and written != f"{crc_of(file, sum_of_header(header)):08x}":
            raise ValueError("its checksum is wrong")


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    if not isinstance(header.get(_METADATA, {}), dict):
        raise ValueError("the metadata of its header is not an object")
    return header
