"""Numbers for the memories of one model, so that no two of them share hash functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TAKEN: ContextVar[set[int] | None] = ContextVar("moezoo_memory_numbers", default=None)


@contextmanager
def numbered_memories() -> Iterator[None]:
    """Number the memories built inside from 0, in the order in which they are built."""
    token = _TAKEN.set(set())
    try:
        yield
    finally:
        _TAKEN.reset(token)


def memory_number(wanted: int | None) -> int:
    """Return a memory's number: the one that is wanted, else the first that is free.

    A memory that is built alone has the number 0.
    """
    taken = _TAKEN.get()
    if taken is None:
        return 0 if wanted is None else wanted
    number = wanted
    if number is None:
        number = next(n for n in range(len(taken) + 1) if n not in taken)
    taken.add(number)
    return number
