"""The thread pool of the tokenizers library, which is left alone here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import cast

_RAYON = "TOKENIZERS_PARALLELISM"


class _RayonSwitch:
    """Turns the tokenizers library's thread pool off while anyone wants it off."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._before: str | None = None

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._before = os.environ.get(_RAYON)
                os.environ[_RAYON] = "false"
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._before is None:
                    del os.environ[_RAYON]
                elif not self._users:
                    os.environ[_RAYON] = cast(str, self._before)


_rayon = _RayonSwitch()


def without_rayon() -> AbstractContextManager[None]:
    """Keep the tokenizers library off its thread pool, of which every later fork would complain.

    Any number of threads may be inside; the environment is as it was when the last has left.
    """
    return _rayon.off()
