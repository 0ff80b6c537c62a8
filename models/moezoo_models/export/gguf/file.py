"""Writing a GGUF file: first what says what is in it, then tensor by tensor."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moezoo_models.export.gguf.encoding import FILE_TYPES, empty, encode, encoding_of
from moezoo_models.export.gguf.library import library
from moezoo_models.export.gguf.tensors import Opened, Stored
from moezoo_models.files.model_files import check_finite


def write_file(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: Sequence[Stored],
    opened: Opened,
    dtype: str,
    shown: Path,
) -> None:
    """Write a GGUF file; one tensor of it is in memory at a time.

    Args:
        path: to write to.
        architecture: llama.cpp's name.
        keys: all others, by their full names.
        tensors: of the file.
        opened: those of the directory.
        dtype: f32, f16 or q8_0.
        shown: what the file will be called, for messages.

    Raises:
        InputError: a tensor holds a NaN, an infinity, or what F16 cannot hold; the disk is full.
    """
    gguf = library()
    writer = gguf.GGUFWriter(None, architecture)
    try:
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in keys.items():
            _add(writer, key, value)
        for stored in tensors:
            encoding = encoding_of(stored, dtype)
            room = empty(stored.shape, encoding)  # its pages are not touched
            raw = gguf.GGMLQuantizationType.Q8_0 if encoding == "q8_0" else None
            writer.add_tensor_info(stored.name, room.shape, room.dtype, room.nbytes, raw)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored in tensors:
            writer.write_tensor_data(_encoded(stored, opened, encoding_of(stored, dtype)))
    except OSError as error:
        if error.errno is not None:
            raise
        # NumPy says how many numbers were written, and not why no more.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shown)) from error
    finally:
        with suppress(AttributeError):
            writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key of the kind that its value has; whole numbers have 32 bits, as floats have."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _encoded(stored: Stored, opened: Opened, encoding: str) -> Any:
    encoded, begin = empty(stored.shape, encoding), 0
    for part in stored.read(opened):
        check_finite(stored.name, part, "the checkpoint")
        encoded[begin : begin + len(part)] = encode(stored.name, part, encoding)
        begin += len(part)
    assert begin == len(encoded), stored.name
    return encoded
