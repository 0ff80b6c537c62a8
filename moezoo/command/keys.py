"""The full key of what a mistake is about: ``optimizer.lr`` is ``model.optimizer.lr`` in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace

from moezoo.errors import InputError

_FIELD = re.compile(r"(?P<field>[A-Za-z_][\w.]*): (?P<problem>.*)", re.DOTALL)


@contextmanager
def full_keys(config: Any) -> Iterator[None]:
    """Name the key of a mistake that arises inside as ``config`` has it.

    Classes know the names of their own arguments, and not where in a configuration they stand.

    Args:
        config: the parsed options.

    Raises:
        InputError: in the place of each :class:`InputError`, also of one that a parser has packed
            into its own error.
    """
    try:
        yield
    except ValueError as error:
        if (mistake := _mistake(error)) is None:
            raise
        raise InputError(full_key(str(mistake), config)) from error


def full_key(message: str, config: Any) -> str:
    """Return a message with the full key of its field, if there is one such key only.

    Of several that end alike, those count whose value the message speaks of.
    """
    match = _FIELD.fullmatch(message)
    if match is None:
        return message
    field, problem = match["field"], match["problem"]
    values = dict(_leaves(config))
    if field in values:
        return message
    ends = [key for key in values if key.endswith(f".{field}")]
    meant = [k for k in ends if problem.startswith((f"{values[k]!r} ", f"{values[k]} "))]
    found = meant[:1] or (ends if len(ends) == 1 else [])
    return f"{found[0]}: {problem}" if found else message


def _mistake(error: BaseException | None) -> InputError | None:
    """Return the user's mistake that led to an error; None if another thing did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, groups of options included."""
    if path:
        yield path, value
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
