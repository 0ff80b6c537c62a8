"""Whether llama.cpp cuts text into the same tokens: asked of itself, where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo_models.text.tokenizer import Tokenizer

SAMPLES = ()


def compare_encodings(file: Path, tokenizer: Tokenizer) -> str:
    raise NotImplementedError
