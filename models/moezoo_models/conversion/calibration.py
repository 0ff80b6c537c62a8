"""Text that a carve is fitted to, and text beside it that it is judged by."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moezoo.errors import InputError, check_int
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.encoding import encode_texts
from moezoo_models.text.tokenizer import Tokenizer

_READ_CHARACTERS = 64_000_000
"""Of a larger source, the beginning is read."""
_PASSAGE_WINDOWS = 4
"""Passages have this many times the characters that a window has tokens."""

_AT_ONCE = 16
"""Passages that are encoded together; of a large source few are needed."""


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens.

    Attributes:
        fitted: ``(windows, length)`` int64, what algorithms may see.
        held_out: the same, from other passages.
        skipped: tokens at the start of each window that are not text.
        source: what was read.
        seed: which of the other passages are fitted to.
        recovery: ``(windows, length)``, what a carved model is trained on; of passages of its own,
            and maybe without windows.
    """

    fitted: Tensor
    held_out: Tensor
    skipped: int
    source: list[str]
    seed: int
    recovery: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def describe(self) -> dict[str, Any]:
        """Return a description for a report; equal tokens have an equal hash."""
        digest = hashlib.sha256()
        for tokens in (self.fitted, self.held_out):
            digest.update(tokens.numpy().tobytes())
        return {
            "source": self.source,
            "tokens": self.fitted.numel(),
            "held_out_tokens": self.held_out.numel(),
            "window": self.fitted.shape[1],
            "seed": self.seed,
            "sha256": digest.hexdigest(),
        }


def read_calibration(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    tokens: int,
    held_out_tokens: int,
    window: int,
    seed: int = 0,
    recovery_tokens: int = 0,
) -> Calibration:
    """Read passages in random order and cut them into windows.

    Each window begins as the model's texts do, with the token that opens documents if there is one.

    Args:
        sources: as for ``moezoo prepare``: ``stdlib``, files, folders, globs.
        tokenizer: the model's.
        vocab_size: of the model.
        tokens: to be fitted to, rounded up to whole windows.
        held_out_tokens: beside those.
        window: length of a window.
        seed: which passages are fitted to; those held out are always the same.
        recovery_tokens: to be trained on, of what is left then; they change none of the others.

    Raises:
        InputError: a source cannot be read or has too little text, or a token is not the model's.
    """
    check_int("calibration_tokens", tokens)
    check_int("held_out_tokens", held_out_tokens)
    check_int("window", window, minimum=2)
    passages = _passages(sources, _PASSAGE_WINDOWS * window)
    # The held-out passages must be the same however many are fitted to.
    random.Random(0).shuffle(passages)
    opening = tokenizer.opening
    text = window - len(opening)
    parts = []
    for wanted in (held_out_tokens, tokens, recovery_tokens):
        count = -(-wanted // window)
        stream, used = _encode(tokenizer, passages, count * text)
        del passages[:used]
        random.Random(seed).shuffle(passages)
        if len(stream) < count * text:
            also = f" + {recovery_tokens:,}" if recovery_tokens else ""
            names = ("calibration_tokens", *(("recover",) if recovery_tokens else ()))
            raise InputError(
                f"calibration: {', '.join(sources)} has too little text for {tokens:,} + "
                f"{held_out_tokens:,}{also} tokens; give more, or lower {', '.join(names)} and "
                "held_out_tokens"
            )
        rows = torch.tensor(stream[: count * text], dtype=torch.int64).view(count, text)
        first = torch.tensor(opening, dtype=torch.int64).expand(count, -1)
        parts.append(torch.cat([first, rows], dim=1))
    if (largest := max(int(part.max()) for part in parts if len(part))) >= vocab_size:
        raise InputError(
            f"tokenizer: it gave token {largest}, and the model has {vocab_size}; they do not "
            "belong together"
        )
    held_out, fitted, recovery = parts
    return Calibration(fitted, held_out, len(opening), list(sources), seed, recovery)


def _passages(sources: Sequence[str], characters: int) -> list[str]:
    """Cut documents at line ends into passages of about so many characters."""
    passages = []
    budget = _READ_CHARACTERS
    for document in _documents(sources):
        if budget <= 0:
            break
        budget -= len(document)
        current: list[str] = []
        size = 0
        for line in document.splitlines(keepends=True):
            current.append(line)
            size += len(line)
            if size >= characters:
                passages.append("".join(current))
                current, size = [], 0
        passages.append("".join(current))
    return [passage for passage in passages if passage.strip()]


def _documents(sources: Sequence[str]) -> Iterator[str]:
    try:
        for source in sources:
            yield from open_corpus(source).documents()
    except InputError as error:
        raise InputError(str(error).replace("source:", "calibration:", 1)) from error


def _encode(tokenizer: Tokenizer, passages: Sequence[str], count: int) -> tuple[list[int], int]:
    """Join whole passages until there are so many tokens, or none left.

    Returns:
        The tokens, and how many passages they are.
    """
    stream: list[int] = []
    used = 0
    for start in range(0, len(passages), _AT_ONCE):
        for ids in encode_texts(tokenizer, passages[start : start + _AT_ONCE]):
            if len(stream) >= count:
                return stream, used
            stream += [*ids, tokenizer.eos_id]
            used += 1
    return stream, used
