"""The header of a GGUF file, read without trusting it.

Little-endian: ``GGUF``, the version, how many tensors and how many keys; the keys with their
values; name, shape, type and offset of each tensor; then, aligned, the tensors themselves.
Whatever reads the file afterwards may count on sizes that are inside it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.errors import InputError

MAGIC = b"GGUF"
FLOATS = ("F32", "F16", "BF16")
"""Types that are written as numbers and not as blocks with common factors."""

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_LONGEST_NAME = 1 << 16
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_MOST_ELEMENTS = 1 << 22  # the largest vocabularies have 2^18 tokens, and twice as many merges


@dataclass(frozen=True)
class Array:
    """A list among the keys, which is not kept.

    Attributes:
        count: how many elements it has.
    """

    count: int


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor, as the header describes it.

    Attributes:
        shape: as torch writes it, the slowest dimension first.
        kind: its type, as llama.cpp calls it: F32, Q8_0, Q4_K, ...
        bits: bits per weight.
    """

    shape: tuple[int, ...]
    kind: str
    bits: float

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        file: where it is.
        keys: its keys with their values.
        tensors: its tensors, by name.
    """

    file: Path
    keys: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """Its architecture, as llama.cpp calls it."""
        return str(self.keys.get("general.architecture"))

    @property
    def numel(self) -> int:
        """The number of weights."""
        return sum(tensor.numel for tensor in self.tensors.values())

    def describe(self) -> str:
        """Return how its matrices are written, in how many bits, and what that means."""
        matrices = [t for t in self.tensors.values() if len(t.shape) > 1]
        kinds = ", ".join(sorted({tensor.kind for tensor in matrices}))
        bits = sorted({round(tensor.bits, 1) for tensor in matrices})
        if not bits:
            return "no matrices"
        span = f"{bits[0]:g}" if len(bits) == 1 else f"{bits[0]:g} to {bits[-1]:g}"
        found = f"{kinds}: {span} bits per weight"
        if all(tensor.kind in FLOATS for tensor in matrices):
            return found
        return f"{found}, dequantized; the quality is that of the quantized file"

    def get(self, name: str, default: Any = None) -> Any:
        """Return a key of its architecture, such as ``block_count``."""
        return self.keys.get(f"{self.architecture}.{name}", default)


def is_gguf(path: Path) -> bool:
    """Return whether a file is one of GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # whoever wants to read it says why that fails


def read_header(file: Path) -> Header:
    """Read a header.

    Raises:
        InputError: the file is no GGUF, is truncated or damaged, or has a type of numbers that
            cannot be dequantized here.
        ModuleNotFoundError: the package gguf is not installed.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise InputError(
                    f"checkpoint: {file} is no GGUF file: it does not begin with GGUF; copy it "
                    "again, or give a model directory"
                )
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(file, data).header()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"checkpoint: {file} cannot be read: {reason}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise _damaged(file, str(error)) from error


class _Parser:
    """A position in a file.

    Args:
        file: its name, for messages.
        data: its bytes.
    """

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data = file, data
        self._place = len(MAGIC)

    def header(self) -> Header:
        """Read all of the header."""
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise InputError(
                f"checkpoint: {self._file} is GGUF of version {version}, and {known} in "
                "little-endian order are read; convert the model again"
            )
        tensors, keys = self._unpack("QQ")
        found: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string(_LONGEST_NAME)
            (kind,) = self._unpack("I")
            if name in found:
                raise _damaged(self._file, f"{name[:80]!r} is there twice")
            found[name] = self._value(kind, f"key {name[:80]!r}")
        return Header(self._file, found, self._tensors(tensors, found))

    def _tensors(self, count: int, keys: dict[str, Any]) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        ends = 0
        for _ in range(count):
            name = self._string(_LONGEST_NAME)
            if name in found:
                raise _damaged(self._file, f"tensor {name[:80]!r} is there twice")
            (dimensions,) = self._unpack("I")
            if dimensions > _MOST_DIMENSIONS:
                raise _damaged(self._file, f"{name[:80]!r} has {dimensions} dimensions")
            shape = self._unpack("Q" * dimensions)[::-1]
            number, offset = self._unpack("IQ")
            kind, elements, size = _kind(self._file, name, number)
            if not shape or shape[-1] % elements or 0 in shape:
                raise _damaged(self._file, f"{name[:80]!r} has shape {shape} in {kind}")
            found[name] = GGUFTensor(shape, kind, 8 * size / elements)
            ends = max(ends, offset + math.prod(shape) // elements * size)
        alignment = keys.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise _damaged(self._file, f"general.alignment is {alignment}")
        wanted = -(-self._place // alignment) * alignment + ends
        if wanted > len(self._data):
            raise _damaged(
                self._file, f"it has {len(self._data):,} bytes, its tensors end at {wanted:,}"
            )
        return found

    def _value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            return self._unpack(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise _damaged(self._file, f"{what} has type {kind}")
        inner, count = self._unpack("IQ")
        if count > _MOST_ELEMENTS:
            raise _damaged(self._file, f"{what} has {count:,} elements")
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):
                (length,) = self._unpack("Q")
                self._skip(length)
        else:
            raise _damaged(self._file, f"{what} is a list of type {inner}")
        return Array(count)

    def _string(self, longest: int | None = None) -> str:
        (length,) = self._unpack("Q")
        if longest is not None and length > longest:
            raise _damaged(self._file, f"a name has {length:,} bytes")
        start = self._place
        self._skip(length)
        return self._data[start : self._place].decode("utf-8")

    def _unpack(self, kinds: str) -> tuple[Any, ...]:
        layout = f"<{kinds}"
        start = self._place
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise _damaged(self._file, f"its header goes on after {len(self._data):,} bytes")
        self._place += count


def _kind(file: Path, tensor: str, number: int) -> tuple[str, int, int]:
    """Return a type's name, and how many elements and bytes its blocks have."""
    name, block = _known(number)
    if block is None:
        raise InputError(
            f"checkpoint: '{tensor[:80]}' in {file} is {name}, which the package gguf cannot "
            "dequantize; get the file in another type, e.g. Q8_0"
        )
    return name, *block


@cache
def _known(number: int) -> tuple[str, tuple[int, int] | None]:
    """Return a type's name, and its elements and bytes per block if it can be dequantized."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    name = next((each.name for each in GGMLQuantizationType if each == number), f"type {number}")
    try:
        kind = GGMLQuantizationType(number)
        elements, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return name, None
    return name, (elements, size)


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"checkpoint: {file} is truncated or damaged ({what}); copy it again")
