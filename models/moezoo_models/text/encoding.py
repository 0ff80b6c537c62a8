"""Texts of any length as tokens: always the same ids, which are those of the uncut text.

The time of one call of a tokenizer can grow steeply with the length of its text, so that a long one
is cut. A cut must not show: a tokenizer that puts a space before every text would add one per
piece, and one that joins a newline with what follows would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from moezoo_models.text.tokenizer import Tokenizer

PIECE_CHARACTERS = 1 << 16
"""Longer texts are encoded piece by piece."""

_CONTEXT = 256
"""Characters on both sides of a cut by which it is judged; few tokens have a tenth of them."""
_ATTEMPTS = 32
"""Line ends, and after them spaces, that are tried before a text is cut where it is longest."""


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of one text of any length, without special tokens, as :func:`encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, of any length, without special tokens.

    A text longer than ``PIECE_CHARACTERS`` is cut behind a line end, else before a space, where the
    text around the cut has the same ids as its two halves. A tokenizer that puts a space before
    each text, or drops line ends, gets it whole.
    """
    pieces = [pieces_of(tokenizer, text) for text in texts]
    encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(pieces))))
    return [list(chain.from_iterable(islice(encoded, len(each)))) for each in pieces]


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Cut a text where its ids do not show it; a short one is one piece.

    The ids of the pieces, one behind the other, are those of the text, as of :func:`encode_texts`.
    """
    if len(text) <= PIECE_CHARACTERS or not _is_seamless(tokenizer):
        return [text]
    return list(_pieces(tokenizer, text))


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(tokenizer, text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(tokenizer: Tokenizer, text: str, start: int) -> int:
    """Return the last place where the piece that begins at ``start`` can end unnoticed."""
    limit = start + PIECE_CHARACTERS
    for mark, behind in (("\n", 1), (" ", 0)):
        for place in islice(_places(text, mark, start, limit), _ATTEMPTS):
            end = place + behind
            left, right = text[max(start, end - _CONTEXT) : end], text[end : end + _CONTEXT]
            if tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right):
                return end
    return limit


def _places(text: str, mark: str, start: int, limit: int) -> Iterator[int]:
    """Yield where ``mark`` is between two places of a text, from the end."""
    place = text.rfind(mark, start + 1, limit)
    while place >= 0:
        yield place
        place = text.rfind(mark, start + 1, place)


def _is_seamless(tokenizer: Tokenizer) -> bool:
    """Return whether the ids of two texts, one behind the other, are those of the texts joined."""
    return tokenizer.decode(tokenizer.encode("a\n") + tokenizer.encode("a\n")) == "a\na\n"
