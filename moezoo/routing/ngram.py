"""Addresses of n-grams: the rows of a table that the last tokens of a text are hashed to.

Heads of one order n share one mix of the last n token ids and differ in the prime that it is
reduced by (Cheng et al. 2026, arXiv:2601.07372, section 2.2):
``row_j = (m_0 x_t ⊕ m_1 x_{t-1} ⊕ … ⊕ m_{n-1} x_{t-n+1}) mod p_j``. Multipliers m are odd and so
small that no product overflows. The polynomial hash is ``Σ_i x_{t-i} Vⁱ mod M_j`` (LongCat).

What lies before a document, and padding, counts as one token more that no text has. All is whole
numbers, the same in every process and on every device.

Shapes: L tokens known of a sequence, S of them to be addressed, N highest order of n-grams,
H heads, those of all orders, V size of the vocabulary.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int
from moezoo_kernels.ngram_rows import ngram_rows
from moezoo_kernels.ngram_rows.plain import tokens_by_distance

Hash = Literal["splitmix", "numpy", "polynomial"]
HASHES = ("splitmix", "numpy", "polynomial")
MOST_ROWS = 1 << 31
"""Of one head."""

_MASK = (1 << 64) - 1
_LARGEST = (1 << 63) - 1
_LAYER = 10007
_GAMMA = 0x9E3779B97F4A7C15


class NGramHash(nn.Module):
    """The rows of each token's n-grams, of orders 2 … N, by several hash functions each.

    Head j of all orders owns the rows from ``offsets[j]`` on, ``sizes[j]`` of them.

    Args:
        vocab_size: V; token ids are below it.
        max_ngram: highest order N.
        num_heads: hash functions per order.
        num_rows: rows of a head, at least: primes from there on, each once in all heads of all
            tables of a model; or, for ``polynomial``, ``num_rows + 1``, ``+ 3``, ``+ 5`` and so on.
        index: which table of the model this is, from 0; it goes on where the table before ended,
            and mixes by other multipliers.
        seed: where the multipliers begin.
        hash_function: ``splitmix`` multipliers (Qwen4, in transformers), ``numpy`` ones (the
            demonstration of Engram's authors), or a ``polynomial`` in V (LongCat-Flash-Lite).
        boundary_id: the token that ends a document: it sees what precedes it, those after it do
            not see it, nor anything before it. None: sequences are whole documents.

    Raises:
        InputError: a number is out of range.
    """

    compressed: Tensor
    multipliers: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        max_ngram: int = 3,
        num_heads: int = 8,
        num_rows: int,
        index: int = 0,
        seed: int = 0,
        hash_function: Hash = "splitmix",
        boundary_id: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.max_ngram = check_int("max_ngram", max_ngram, minimum=2, maximum=8)
        self.num_heads = check_int("num_heads", num_heads, maximum=32)
        self.num_rows = check_int("num_rows", num_rows, minimum=2, maximum=MOST_ROWS)
        self.index = check_int("index", index, minimum=0, maximum=63)
        self.seed = check_int("seed", seed, minimum=0)
        self.hash_function = check_choice("hash_function", hash_function, HASHES)
        self.boundary_id = boundary_id
        if boundary_id is not None:
            check_int("boundary_id", boundary_id, minimum=0, maximum=vocab_size - 1)
        heads = (max_ngram - 1) * num_heads
        self.sizes = self._sizes(heads)
        self.offsets = [sum(self.sizes[:head]) for head in range(heads)]
        self.total_rows = sum(self.sizes)
        # Its last entry is for where there is no token.
        self.register_buffer("compressed", torch.empty(vocab_size + 1, dtype=torch.int64))
        wanted = 0 if hash_function == "polynomial" else max_ngram
        self.register_buffer("multipliers", torch.empty(wanted, dtype=torch.int64))
        self.reset_parameters()

    def _sizes(self, heads: int) -> list[int]:
        before = self.index * heads
        if self.hash_function != "polynomial":
            return distinct_primes(self.num_rows, heads, before)
        if self.num_rows % self.vocab_size == 0:
            warnings.warn(
                f"num_rows: {self.num_rows} is a multiple of vocab_size {self.vocab_size}, so a "
                "polynomial hash collides often; give a number in between",
                stacklevel=4,
            )
        return [self.num_rows + 2 * (before + head) + 1 for head in range(heads)]

    def reset_parameters(self) -> None:
        """Take each token for a class of its own; the seed decides the multipliers."""
        if not self.compressed.is_meta:
            self._install(torch.arange(self.vocab_size))

    def compress(self, classes: Tensor) -> None:
        """Hash classes of tokens in place of tokens, as the paper does; see :func:`text_classes`.

        Args:
            classes: ``(V,)`` integers from 0, the class of each token.

        Raises:
            InputError: another shape, no integers, or negative ones.
        """
        if classes.shape != (self.vocab_size,) or classes.is_floating_point():
            raise InputError(
                f"classes: give {self.vocab_size} integers, not {classes.dtype} "
                f"{tuple(classes.shape)}"
            )
        if classes.min() < 0 or classes.max() >= self.vocab_size:
            raise InputError(
                f"classes: {int(classes.min())} to {int(classes.max())} are not numbers of "
                f"classes; give 0 to {self.vocab_size - 1}"
            )
        self._install(classes)

    def _install(self, classes: Tensor) -> None:
        count = int(classes.max()) + 1
        nowhere = count if self.boundary_id is None else int(classes[self.boundary_id])
        self.compressed[:-1] = classes
        self.compressed[-1] = nowhere
        draw = numpy_multipliers if self.hash_function == "numpy" else splitmix_multipliers
        found = draw(count, len(self.multipliers), self.seed, self.index)
        self.multipliers.copy_(torch.tensor(found, dtype=torch.int64))

    @property
    def reach(self) -> int:
        """How many tokens before one change its rows, N - 1."""
        return self.max_ngram - 1

    def forward(self, token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """Return the rows of the last ``length`` tokens, those of a head beside each other.

        Args:
            token_ids: ``(..., L)`` int64; no more than the last S + N - 1 are read.
            mask: ``(..., L)`` bool, true at real tokens. Padding has rows too, of no meaning.
            length: S.

        Returns:
            ``(H, ..., S)`` int64.
        """
        begin = max(token_ids.shape[-1] - length - self.reach, 0)
        rows = ngram_rows(
            token_ids[..., begin:],
            None if mask is None else mask[..., begin:],
            self.compressed,
            self.multipliers,
            self.sizes,
            self.offsets,
            orders=self.reach,
            boundary=self.boundary_id,
            length=length,
        )
        return rows.movedim(-1, 0)

    def owners(self, token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """Return what the last ``length`` tokens are addressed by, ``(..., S, N)`` int64.

        The classes of a token and of those before it, the nearest first, as far as they are seen.
        An n-gram of order n is the first n of them: two that differ there may share a row.

        Args:
            token_ids: as for :meth:`forward`, as mask and length.
            mask: as there.
            length: as there.
        """
        given = token_ids, mask, self.compressed, self.reach, self.boundary_id, length
        return torch.stack(tokens_by_distance(*given), dim=-1)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.hash_function}, {self.total_rows} rows, orders 2 to {self.max_ngram}"


def splitmix_multipliers(vocab_size: int, count: int, seed: int, index: int) -> list[int]:
    """Return odd multipliers below ``2^63 / V``, by SplitMix64 (Steele et al. 2014), as Qwen4's.

    Args:
        vocab_size: V.
        count: how many.
        seed: of the model.
        index: of the table.
    """
    half = max(1, _LARGEST // vocab_size // 2)
    start = seed + _LAYER * index
    return [2 * (_splitmix(start + _GAMMA * (i + 1)) % half) + 1 for i in range(count)]


def _splitmix(state: int) -> int:
    z = (state + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def numpy_multipliers(vocab_size: int, count: int, seed: int, index: int) -> list[int]:
    """Return odd multipliers below ``2^63 / V``, as the demonstration of Engram draws them."""
    half = max(1, _LARGEST // vocab_size // 2)
    drawn = np.random.default_rng(seed + _LAYER * index).integers(0, half, count, dtype=np.int64)
    return [2 * int(value) + 1 for value in drawn]


def distinct_primes(least: int, count: int, before: int = 0) -> list[int]:
    """Return ``count`` primes in ascending order, from ``least`` on, without the first ``before``.

    Heads of different primes agree on a collision of one of them by chance only.
    """
    found: list[int] = []
    candidate = least
    while len(found) < before + count:
        if _is_prime(candidate):
            found.append(candidate)
        candidate += 1
    return found[before:]


def _is_prime(number: int) -> bool:
    if number < 2 or number % 2 == 0:
        return number == 2
    return all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))


def text_classes(texts: Sequence[str | None]) -> Tensor:
    """Number the tokens by what they read like, ``(V,)`` int64: " Apple" and "apple" are one.

    As the paper compresses its vocabulary (section 2.2): compatibility characters, accents, case
    and the amount of white space make no difference.

    Args:
        texts: what each token decodes to; None for one that is no text by itself, as a part of a
            character, which keeps a class of its own.
    """
    numbers: dict[object, int] = {}
    keys = [token if text is None else _normal(text) for token, text in enumerate(texts)]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _normal(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(c for c in decomposed if not unicodedata.category(c).startswith("M"))
    words = " ".join(bare.lower().split())
    return words or (" " if bare else text)
