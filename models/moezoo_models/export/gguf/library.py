"""The gguf package, which writes the files; it is no dependency."""

from __future__ import annotations

import importlib
from typing import Any

from moezoo.errors import InputError


def library() -> Any:
    """Return the gguf package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(
            f"target: GGUF files need the gguf package ({error}); run: pip install 'moezoo[gguf]'"
        ) from error
