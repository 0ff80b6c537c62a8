"""How many rows of a table each token gets, where frequent tokens get more than rare ones.

Tseng & De Sa 2026, arXiv:2601.21461, section 3.2: every token has a row, and none more than a
bound. The text is cut into words as Lempel, Ziv and Welch compress it; a word that is found often
gives its last token one more row, so that a token gets as many as there are frequent contexts that
end in it.

Shapes: V size of the vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch
from torch import Tensor

from moezoo.errors import InputError


def uniform_rows(vocab_size: int, num_rows: int) -> Tensor:
    """Deal rows out evenly, the first tokens getting those that are left: ``(V,)`` int64."""
    each, left = divmod(num_rows, vocab_size)
    return torch.full((vocab_size,), each).add_((torch.arange(vocab_size) < left).long())


def frequent_rows(frequencies: Tensor, num_rows: int, most: int) -> Tensor:
    """Return counts where each further row goes to the token that has the most occurrences per row.

    Args:
        frequencies: ``(V,)``, how often each token occurs.
        num_rows: of all tokens together, V at least and V times ``most`` at most.
        most: rows of a token.

    Returns:
        ``(V,)`` int64.
    """
    return _dealt(torch.ones(len(frequencies), dtype=torch.int64), frequencies, num_rows, most)


def _dealt(rows_V: Tensor, frequencies: Tensor, num_rows: int, most: int) -> Tensor:
    amounts, rows = frequencies.double().tolist(), rows_V.tolist()
    # Tokens that never occur come last, and share what is left.
    waiting = [(-amounts[t] / rows[t], rows[t], t) for t in range(len(rows)) if rows[t] < most]
    heapq.heapify(waiting)
    for _ in range(num_rows - sum(rows)):
        _, _, token = heapq.heappop(waiting)
        rows[token] += 1
        if rows[token] < most:
            heapq.heappush(waiting, (-amounts[token] / rows[token], rows[token], token))
    return torch.tensor(rows)


def word_rows(
    tokens: Iterable[int], vocab_size: int, num_rows: int, most: int, end: int | None = None
) -> Tensor:
    """Return rows of the last tokens of frequent words, the most frequent word first (algorithm 1).

    Where the words do not suffice, :func:`frequent_rows` deals out the rest.

    Args:
        tokens: of a text.
        vocab_size: V.
        num_rows: of all tokens together, V at least and V times ``most`` at most.
        most: rows of a token.
        end: token that ends a document, across which no word goes.

    Returns:
        ``(V,)`` int64.

    Raises:
        InputError: a token is outside the vocabulary.
    """
    counts, last = [0] * vocab_size, list(range(vocab_size))  # of the words; these are of one token
    seen = [0] * vocab_size
    longer: dict[int, int] = {}  # the number of a word, by the one it goes on from and its token
    word = -1
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InputError(f"tokens: id {token} is outside the vocabulary of {vocab_size}")
        seen[token] += 1
        known = token if word < 0 else longer.get(word * vocab_size + token)
        if known is None:  # the word ends here; with this token behind it, it is known from now on
            counts[word] += 1
            longer[word * vocab_size + token] = len(counts)
            counts.append(1)
            last.append(token)
        elif token == end:
            counts[known] += 1
        word = -1 if known is None or token == end else known
    order = torch.tensor(counts).argsort(descending=True, stable=True).tolist()
    rows, left = [1] * vocab_size, num_rows - vocab_size
    for number in order:
        if not (left and counts[number]):
            break
        if rows[last[number]] < most:
            rows[last[number]] += 1
            left -= 1
    return _dealt(torch.tensor(rows), torch.tensor(seen), num_rows, most)
