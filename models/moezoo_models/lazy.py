"""Public names of a package, loaded from its modules when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazily(package: str, modules: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package (PEP 562).

    The decoder imports modules of ``checkpoints``, whose public functions need the decoder: names
    loaded at once would be a circle.

    Args:
        package: its ``__name__``.
        modules: public names by the module of the package that has them.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return load
