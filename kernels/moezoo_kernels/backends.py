"""Which implementation an op runs, and why the others cannot: a table one can print.

Each op lists its backends in order of preference. The first one that is usable for the device and
dtype runs, unless one is forced with :func:`use` or the environment variable ``MOEZOO_BACKEND``.
Forcing holds for every op that has a backend of that name; ops without it choose as always.

Under forward-mode derivatives and ``torch.func.grad`` the reference runs whatever is forced, as it
alone is made of ops that torch can differentiate in any way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch

from moezoo_kernels import transforms

REFERENCE = "reference"
"""The backend of an op that is made of torch's own ops."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: what :func:`use` is told.
        function: the op itself; None if the backend is only looked for.
        usable: given device and dtype, None if it runs there, else the reason why not.
    """

    name: str
    function: Callable[..., Any] | None
    usable: Callable[[torch.device, torch.dtype], str | None]


class Row(NamedTuple):
    """One line of :func:`table`."""

    op: str
    backend: str
    device: str
    usable: bool
    default: bool
    reason: str  # empty if usable


_BACKENDS: dict[str, dict[str, Backend]] = {}
_forced: str | None = os.environ.get("MOEZOO_BACKEND") or None


def register(op: str, *backends: Backend) -> None:
    """List the backends of an op, the preferred one first."""
    _BACKENDS[op] = {backend.name: backend for backend in backends}


class use:
    """Force a backend, from here on or, as a context manager, inside a ``with`` block.

    Args:
        name: a backend's name, or None to choose by device again.

    Raises:
        ValueError: no op has a backend of that name. Whether it is usable is checked when an op
            runs, as only then device and dtype are known.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check_name(name, "backend")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> None:
        """Keep the backend that the constructor set."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to what was forced before."""
        global _forced
        _forced = self._previous


def forced() -> str | None:
    """Name the backend in force, or None; the reference where torch transforms what is computed."""
    if not transforms.is_transformed():
        return _forced
    return REFERENCE


def choose(
    op: str, device: torch.device, dtype: torch.dtype, *, prefer: str | None = None
) -> Callable[..., Any]:
    """Return the function that runs ``op`` on ``device`` in ``dtype``.

    Args:
        op: the op's name.
        device: where the operands are.
        dtype: what the op computes in.
        prefer: a backend to put first, where the size of the operands speaks for it.

    Raises:
        ValueError: a backend is forced that cannot run there; the message says why.
    """
    name = _choose(op, _forced, prefer, device, dtype)
    function = _BACKENDS[op][name].function
    assert function is not None
    return function


def _choose(
    op: str, name: str | None, prefer: str | None, device: torch.device, dtype: torch.dtype
) -> str:
    table = _BACKENDS[op]
    if REFERENCE in table and transforms.is_differentiated():
        return REFERENCE
    if name is not None:
        _check_name(name, "MOEZOO_BACKEND")
    if name is None or name not in table:
        preferred = prefer is not None and table[prefer].usable(device, dtype) is None
        return prefer if prefer and preferred else _default(op, device, dtype)
    if reason := table[name].usable(device, dtype):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"backend '{name}' cannot run {op} on {device} in {kind}: {reason}")
    return name


# What torch.compiler.assume_constant_result does, which would import the compiler: that takes
# longer than everything else that `import moezoo` does.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _default(op: str, device: torch.device, dtype: torch.dtype) -> str:
    return next(b.name for b in _BACKENDS[op].values() if b.usable(device, dtype) is None)


def _check_name(name: str, field: str) -> None:
    known = sorted({backend for backends in _BACKENDS.values() for backend in backends})
    if name not in known:
        raise ValueError(f"{field}: no backend '{name}'; choose from: {', '.join(known)}")


def table(dtype: torch.dtype = torch.float32) -> list[Row]:
    """List every backend of every op on every kind of device this machine has.

    Args:
        dtype: what the operands would be.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        _row(op, backend, torch.device(device), dtype)
        for op, backends in _BACKENDS.items()
        for device in devices
        for backend in backends.values()
    ]


def _row(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> Row:
    reason = backend.usable(device, dtype)
    default = backend.name == _default(op, device, dtype)
    return Row(op, backend.name, str(device), reason is None, default, reason or "")
