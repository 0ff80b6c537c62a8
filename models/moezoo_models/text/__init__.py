"""Text and token ids: corpora, tokenizers, and reading one with the other."""

from typing import TYPE_CHECKING

from moezoo_models.lazy import lazily

if TYPE_CHECKING:
    from moezoo_models.text.corpus import Corpus, open_corpus
    from moezoo_models.text.encoding import encode_text, encode_texts
    from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
else:
    __getattr__ = lazily(
        __name__,
        {
            "corpus": ("Corpus", "open_corpus"),
            "encoding": ("encode_text", "encode_texts"),
            "tokenizer": ("Tokenizer", "load_tokenizer"),
        },
    )

__all__ = ["Corpus", "Tokenizer", "encode_text", "encode_texts", "load_tokenizer", "open_corpus"]
