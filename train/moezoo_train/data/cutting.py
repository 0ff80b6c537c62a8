"""Holding out the end of a document, where whole ones would be too much of the text.

A single file is one document; and of a few documents, the one that is held out may be most of the
text. Of such a one only the end is held out, as much as ``val_fraction`` of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moezoo.errors import InputError
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.data.encoders import Encoders
from moezoo_train.data.prepared import SplitName, token_dtype

_ALWAYS_WHOLE = 0.05
"""Share of the text up to which a document is held out as a whole, however little is asked for."""


class Part(NamedTuple):
    """One of the two parts of a document.

    Attributes:
        tokens: ``(tokens,)``, boundary tokens included.
        bytes: length of its text in UTF-8.
    """

    tokens: NDArray[Any]
    bytes: int


@dataclass(frozen=True)
class Cut:
    """A document that is in both splits, in parts.

    Attributes:
        key: of the document, and of all that are equal to it.
        parts: which part each split gets.
    """

    key: np.uint64
    parts: dict[SplitName, Part]


def document_to_cut(documents: NDArray[Any], val_fraction: float) -> int | None:
    """Return the number of the document whose end is to be held out; None if whole ones are.

    It is the one that would be held out whole, where there is a single one, or where it is more
    than twice what is asked for and more than a twentieth of the text.

    Args:
        documents: tokens, bytes and key of each, a structured array.
        val_fraction: share that is asked for.
    """
    keys, sizes = documents["key"], documents["bytes"]
    number = int(keys.argmin())
    if (equal := keys == keys[number]).all():
        return number
    if round(val_fraction * len(keys)) > 1:
        return None
    share = float(sizes[equal].sum() / sizes.sum())
    return number if share > max(2 * val_fraction, _ALWAYS_WHOLE) else None


def cut_document(
    text: str,
    documents: NDArray[Any],
    number: int,
    val_fraction: float,
    tokenizer: Tokenizer,
) -> Cut:
    """Cut a document so that its end is a share of all text.

    Args:
        text: of the document.
        documents: tokens, bytes and key of each, a structured array.
        number: which of them it is.
        val_fraction: the share.
        tokenizer: encodes both parts, each as a document of its own.

    Raises:
        InputError: it has a single character.
    """
    key, sizes = documents["key"][number], documents["bytes"]
    share = val_fraction * float(sizes.sum() / sizes[documents["key"] == key].sum())
    dtype, encoders = token_dtype(tokenizer.vocab_size), Encoders(tokenizer, 1)
    train, val = (
        Part(encoders.here([each]).astype(dtype), len(each.encode()))
        for each in cut_text(text, share)
    )
    return Cut(key, {"train": train, "val": val})


def cut_text(text: str, share: float) -> tuple[str, str]:
    """Return a text in two, the second of about so large a share; between lines where that does.

    Both have a character or more. The second begins with a line unless it would have more than
    twice the share.

    Raises:
        InputError: the text has a single character.
    """
    if len(text) < 2:
        raise InputError(
            "source: training and validation need two characters of text; this has one; give more"
        )
    wanted = min(max(round(share * len(text)), 1), len(text) - 1)
    place = len(text) - wanted
    line = text.rfind("\n", 0, place) + 1
    if line and len(text) - line <= 2 * wanted:
        place = line
    return text[:place], text[place:]
