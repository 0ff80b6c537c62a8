"""Text and token ids: corpora, tokenizers, and reading one with the other."""
