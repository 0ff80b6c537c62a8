"""Checks that options of several matrices share."""

from __future__ import annotations

from moezoo.errors import InputError, check_int, check_number


def check_multiple(field: str, of: int, width: int) -> None:
    """Raise :class:`InputError` unless a width is a multiple of ``of``."""
    if width % of:
        raise InputError(
            f"{field}: a width of the block, {width}, is no multiple of {of}; change one of them"
        )


def check_n_of_m(n: int, m: int, inputs: int) -> None:
    """Raise :class:`InputError` unless N of M are fewer than M, and fit a number of inputs."""
    check_int("matrices.m", m, minimum=2)
    check_int("matrices.n", n, maximum=m - 1)
    check_multiple("matrices.m", m, inputs)


def check_span(start: float, end: float) -> None:
    """Raise :class:`InputError` unless two shares of the run are in order."""
    check_number("matrices.start", start, maximum=1.0)
    check_number("matrices.end", end, maximum=1.0)
    if start >= end:
        raise InputError(f"matrices.end: {end:g} is not after start, {start:g}; give a later one")


def check_share(field: str, share: float | None) -> None:
    """Raise :class:`InputError` unless a share of the run is in (0, 1], or None."""
    if share is not None and check_number(field, share, maximum=1.0) == 0.0:
        raise InputError(f"{field}: 0 is before the run; give a share of it, or null for never")
