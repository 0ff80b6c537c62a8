"""What a sentencepiece model says of itself: its kind, and how it normalises text.

The file is a protocol buffer. Read here are a few numbers of its ``TrainerSpec`` and
``NormalizerSpec``, which the sentencepiece package does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moezoo.errors import InputError

_TRAINER, _NORMALIZER = 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2


@dataclass(frozen=True)
class Normalization:
    """What llama.cpp is told of a sentencepiece model.

    Attributes:
        add_space_prefix: whether a space is put before a text.
    """

    add_space_prefix: bool


def read_normalization(model: bytes) -> Normalization:
    """Return how a model normalises text, if llama.cpp can do the same.

    Args:
        model: contents of a ``tokenizer.model``.

    Raises:
        InputError: it is damaged, no BPE, without tokens for bytes, or changes text otherwise than
            by a space before it.
    """
    try:
        parts = dict(_fields(model))
        trainer = dict(_fields(_as_bytes(parts.get(_TRAINER, b""))))
        normalizer = dict(_fields(_as_bytes(parts.get(_NORMALIZER, b""))))
    except (IndexError, ValueError) as error:
        raise InputError(
            f"tokenizer: tokenizer.model is damaged ({error}); copy it again"
        ) from error
    problem = None
    if trainer.get(3, 1) != _BPE:
        problem = "is no BPE (model_type)"
    elif not trainer.get(35, 0):
        problem = "has no tokens for bytes (byte_fallback)"
    elif normalizer.get(2):
        problem = "rewrites characters (precompiled_charsmap)"
    elif normalizer.get(4, 1):
        problem = "removes spaces (remove_extra_whitespaces)"
    elif not normalizer.get(5, 1):
        problem = "leaves spaces as they are (escape_whitespaces)"
    if problem:
        raise InputError(
            f"tokenizer: tokenizer.model {problem}, which llama.cpp was not compared in; serve the "
            "model with transformers"
        )
    return Normalization(bool(normalizer.get(3, 1)))


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a part should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message by number; the last of a repeated one counts."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind, value = tag & 7, 0
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
        elif kind == _BYTES:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("it ends within a part")
            yield tag >> 3, data[place : place + length]
            place += length
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a part of unknown kind {kind}")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number has no end")
