"""What a user got wrong, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: one line that names the field and the fix.

    The command line prints it as ``moezoo: error: …`` and exits with 2; from Python it is an
    ordinary ``ValueError``.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice most like ``name``, else list them all."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; choose from: {', '.join(choices)}"


def check_choice(field: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise :class:`InputError`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{field}: {value!r} is not known{nearest(str(value), choices)}")
    return str(value)


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
