"""Tokens as text, piece by piece while they come."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from moezoo_models.text.tokenizer import Tokenizer

_BROKEN_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class WholeCharacterStreamer(BaseStreamer):
    """Turns tokens into text as they come, holding bytes back until they make whole characters.

    Tokens are decoded together with those before them, as a tokenizer may write a token otherwise
    at the beginning of a text.

    Args:
        tokenizer: decodes the tokens.
        on_text: called with each piece of text; never with the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._context = 0
        self._written: int | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, then each new one."""
        self._ids.extend(value.flatten().tolist())
        if self._written is None:
            self._written = len(self._ids)
        else:
            self._write(final=False)

    def end(self) -> None:
        """Write what is held back, whole or not."""
        self._write(final=True)

    def _write(self, final: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._context : self._written])
        text = self._tokenizer.decode(self._ids[self._context :])
        whole = final or not text.endswith(_BROKEN_CHARACTER)
        if whole and len(text) > len(before):
            self._on_text(text[len(before) :])
            self._context, self._written = self._written or 0, len(self._ids)
