"""Which of llama.cpp's pre-tokenizers cuts text as a byte-level BPE's own does.

llama.cpp has them in its code, by name; a wrong one gives wrong ids without a word. So a tokenizer
is recognised by what it does, its regular expressions, and never by what it is called. Those here
were compared id by id (``tests/models/export/gguf/test_llama_cpp.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.errors import InputError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"

_BY_REGEX = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
}
"""By the expression, and by whether words that are tokens are taken without merging."""


def pre_tokenizer_of(definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``.

    Args:
        definition: its contents.

    Raises:
        InputError: it is none of those known.
    """
    _check_model(definition["model"])
    normalizer = definition.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise InputError(
            f"tokenizer: its normalizer {_shown(normalizer)} is none of llama.cpp's; serve the "
            "model with transformers"
        )
    steps = _steps(definition.get("pre_tokenizer"))
    ignores = bool(definition["model"].get("ignore_merges"))
    kinds = [step.get("type") for step in steps]
    name = None
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and regex and not ignores:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and regex and not ignores:
            name = "smollm" if steps[0].get("individual_digits") else None
        elif kinds == ["Split", "ByteLevel"] and not regex:
            name = _by_regex(steps[0], ignores)
    if name is None:
        raise InputError(
            f"tokenizer: its pre-tokenizer {_shown(definition.get('pre_tokenizer'))} is none that "
            "llama.cpp was compared in; serve the model with transformers"
        )
    return name


def composes(definition: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer composes characters first (NFC), which llama.cpp does not."""
    return definition.get("normalizer") is not None


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(
            "tokenizer: tokenizer.json is no byte-level BPE; put the tokenizer.model of its "
            "sentencepiece beside it, or serve the model with transformers"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise InputError(
                f"tokenizer: llama.cpp knows no {name}; serve the model with transformers"
            )


def _steps(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def _by_regex(split: Mapping[str, Any], ignores: bool) -> str | None:
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return _BY_REGEX.get((split["pattern"].get("Regex"), ignores))


def _shown(part: Any) -> str:
    text = str(part)
    return text if len(text) <= 80 else f"{text[:79]}…"
