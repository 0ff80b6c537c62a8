"""The tokenizer that a GGUF file holds, as files of Hugging Face."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from moezoo_models.files.gguf.header import Array, Header
from moezoo_models.files.gguf.reading import quiet, told

_TOKENS = "tokenizer.ggml.tokens"
_MODEL, _SPLIT = "tokenizer.ggml.model", "tokenizer.ggml.pre"
# Names of llama.cpp for texts split into words as GPT-2 splits them.
_AS_GPT2 = ("default", "gpt-2", "gpt2")
_DIGITS = ("smollm",)
"""The same, after each digit has been set apart."""


def write_tokenizer(header: Header, folder: Path) -> str | None:
    """Write the tokenizer's files, converted by transformers.

    Args:
        header: of the file.
        folder: where.

    Returns:
        Why there is none; None if it is written.

    Raises:
        InputError: transformers cannot convert it.
    """
    if not isinstance(header.keys.get(_TOKENS), Array):
        return f"{header.file} holds no tokenizer"
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = header.keys.get(_SPLIT, "default")
    bytewise = header.keys.get(_MODEL) == "gpt2"
    if bytewise and split not in (*_AS_GPT2, *_DIGITS, *GGUF_PRE_TOKENIZER_SPLITS):
        return f"how its tokenizer splits text into words, '{split}', is not known"
    # Alone in a folder, so that nothing beside the file is read for settings or code.
    with tempfile.TemporaryDirectory() as alone, told(header.file), quiet():
        os.symlink(header.file.resolve(), Path(alone, "model.gguf"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            alone, gguf_file="model.gguf", local_files_only=True
        )
        if bytewise and split in _DIGITS:
            _set_digits_apart(tokenizer.backend_tokenizer)
        if header.keys.get("tokenizer.ggml.add_bos_token") is False:
            tokenizer.bos_token = None  # it has one, but texts do not begin with it
        for name in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
            tokenizer.init_kwargs.pop(name, None)  # it would be saved along
        tokenizer.save_pretrained(folder)
    return None


def _set_digits_apart(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
