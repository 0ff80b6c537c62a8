"""A user's mistakes, each reported in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Bad input: one line that names the field and the fix.

    The command line prints it as ``moezoo: error: …`` and exits with 2; from Python it is an
    ordinary ``ValueError``.
    """


_MEANINGS = (
    ("16-mixed", "16-true", "16", "fp16", "float16", "half", "f16"),
    ("bf16-mixed", "bf16-true", "bf16", "bfloat16"),
    ("32-true", "32", "fp32", "float32", "float", "single", "full", "f32"),
    ("64-true", "64", "fp64", "float64", "double", "f64"),
    ("int8", "uint8", "fp8", "float8", "int4", "fp4"),
    ("mistral",),
    ("mixtral",),
)
"""Words that are spelt alike and mean another thing; each row has what means the same."""


def closest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that ``name`` is likely to mean; None if it is like none of them.

    A word whose meaning is known is never taken for one that is only spelt alike: ``fp16`` is
    ``16-mixed`` and not ``bf16``, and ``mixtral`` is no slip for ``mistral``.
    """
    choices = sorted(choices)
    for words in _MEANINGS:
        if name.lower() in words:
            return next((word for word in words if word in choices and word != name), None)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    return close[0] if close else None


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice most like ``name``, else list them all."""
    choices = sorted(choices)
    close = closest(name, choices)
    return f"; did you mean '{close}'?" if close else f"; choose from: {', '.join(choices)}"


def check_choice(field: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise :class:`InputError`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{field}: {value!r} is not known{nearest(str(value), choices)}")
    return str(value)


def check_flag(field: str, value: Any) -> bool:
    """Return ``value`` if it is true or false, else raise :class:`InputError`."""
    if not isinstance(value, bool):
        raise InputError(f"{field}: {value!r} is neither true nor false; give one of them")
    return value


def check_int(field: str, value: Any, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Return ``value`` if it is a whole number in range, else raise :class:`InputError`."""
    wanted = f"a whole number ≥ {minimum}" + (f" and ≤ {maximum}" if maximum is not None else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{field}: {value!r} is not {wanted}")
    if value < minimum or (maximum is not None and value > maximum):
        raise InputError(f"{field}: {value} is out of range; give {wanted}")
    return value


def check_number(
    field: str, value: Any, *, minimum: float = 0.0, maximum: float | None = None
) -> float:
    """Return ``value`` as a float if it is a finite number in range, else :class:`InputError`."""
    wanted = f"a number ≥ {minimum:g}" + (f" and ≤ {maximum:g}" if maximum is not None else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{field}: {value!r} is not {wanted}")
    if not value >= minimum or value == float("inf") or (maximum is not None and value > maximum):
        raise InputError(f"{field}: {value:g} is out of range; give {wanted}")
    return float(value)


def check_text(field: str, value: str) -> str:
    """Return ``value`` if it can be encoded, else raise :class:`InputError`.

    Bytes of a command line that are not UTF-8 come as characters that cannot.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{field}: character {error.start + 1} is not UTF-8 text; type it again"
        ) from error
    return value


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Add to Ctrl-C how to go on; the command line prints it and exits with 130."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {how}") from stop
