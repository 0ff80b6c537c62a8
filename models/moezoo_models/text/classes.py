"""What the tokens of a vocabulary read like, each by itself."""

from __future__ import annotations

from torch import Tensor

from moezoo.routing.ngram import text_classes
from moezoo_models.text.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str | None]:
    """Return the text of each token, or None where it has none by itself.

    None have special tokens, parts of characters, and ids that the tokenizer does not know.

    Args:
        tokenizer: decodes the tokens.
        vocab_size: number of texts wanted.
    """
    known = min(tokenizer.vocab_size, vocab_size)
    found: list[str | None] = []
    for token in range(known):
        text = tokenizer.decode([token])
        found.append(None if not text or _BROKEN in text else text)
    return found + [None] * (vocab_size - known)


def token_classes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Number the tokens by what they read like, ``(vocab_size,)`` int64; see :func:`text_classes`.

    Args:
        tokenizer: of the vocabulary.
        vocab_size: number of tokens.
    """
    return text_classes(token_texts(tokenizer, vocab_size))
