"""A tokenizer as the keys of a GGUF file, which holds it whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moezoo.errors import InputError
from moezoo_models.export.gguf.pre_tokenizers import composes, pre_tokenizer_of
from moezoo_models.export.gguf.samples import SAMPLES
from moezoo_models.export.gguf.sentencepiece import read_normalization
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""

_START = "tokenizer.ggml."
_NO_SCORE = -1000.0


def vocabulary_keys(tokenizer: Tokenizer, room: int) -> dict[str, Any]:
    """Return the keys that describe a tokenizer.

    Args:
        tokenizer: of Hugging Face's files with a byte-level BPE, or of sentencepiece.
        room: rows of the model's embeddings; ids that are no token's are named as unused.

    Raises:
        InputError: it cuts text otherwise than llama.cpp does, or has more tokens than the model.
    """
    if tokenizer.vocab_size > room:
        raise InputError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model {room}; give the one that "
            "it was trained with"
        )
    model = tokenizer.sentencepiece_model
    if model is not None:
        keys = _of_pieces(model, tokenizer, room)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        keys = _of_merges(tokenizer, room)
    else:
        raise InputError("tokenizer: it is of no kind that llama.cpp reads; give another")
    return keys | _special(tokenizer)


def changes_text(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer composes characters, which llama.cpp leaves as they are."""
    if tokenizer.sentencepiece_model is not None or not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    return composes(_definition(tokenizer))


def _definition(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            "tokenizer: it has no tokenizer.json; save it by a tokenizer of the tokenizers library"
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _of_merges(tokenizer: HuggingFaceTokenizer, room: int) -> dict[str, Any]:
    """Describe a byte-level BPE."""
    definition = _definition(tokenizer)
    name = pre_tokenizer_of(definition)
    model = definition["model"]
    tokens = {int(number): text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for added in definition.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    if not merges:
        raise InputError(
            "tokenizer: it has no merges, without which llama.cpp reads no BPE; give another"
        )
    ids = range(room)
    return {
        f"{_START}model": "gpt2",
        f"{_START}pre": name,
        f"{_START}tokens": [tokens.get(number, f"[PAD{number}]") for number in ids],
        f"{_START}token_type": [kinds.get(number, UNUSED) for number in ids],
        f"{_START}merges": merges,
    }


def _of_pieces(model: bytes, tokenizer: Tokenizer, room: int) -> dict[str, Any]:
    """Describe a sentencepiece model, and tokens that Hugging Face's files add to it."""
    import sentencepiece

    normalization = read_normalization(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores, kinds = [], [], []
    for number in range(pieces.get_piece_size()):
        tokens.append(pieces.id_to_piece(number))
        scores.append(float(pieces.get_score(number)))
        kinds.append(_kind(pieces, number, tokens[-1]))
    added: Mapping[int, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        if any(tokenizer.encode(text) != pieces.encode(text) for text in SAMPLES):
            raise InputError(
                "tokenizer: tokenizer.json and tokenizer.model give other ids; remove the one that "
                "the model was not trained with"
            )
        added = getattr(tokenizer.hf, "added_tokens_decoder", {})
    for number in range(len(tokens), room):
        token = added.get(number)
        tokens.append(f"[PAD{number}]" if token is None else str(token))
        scores.append(_NO_SCORE)
        kinds.append(UNUSED if token is None else CONTROL if token.special else USER_DEFINED)
    return {
        f"{_START}model": "llama",
        f"{_START}pre": "default",
        f"{_START}tokens": tokens,
        f"{_START}scores": scores,
        f"{_START}token_type": kinds,
        f"{_START}add_space_prefix": normalization.add_space_prefix,
    }


def _kind(pieces: Any, number: int, text: str) -> int:
    if pieces.is_unknown(number):
        return UNKNOWN
    if pieces.is_control(number):
        return CONTROL
    if pieces.is_byte(number):
        return BYTE
    if pieces.is_unused(number):
        return UNUSED
    return NORMAL


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids that begin and end texts, what is added to a text, and the chat template."""
    keys: dict[str, Any] = {f"{_START}eos_token_id": tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        keys[f"{_START}bos_token_id"] = tokenizer.bos_id
    begins = ends = False
    if isinstance(tokenizer, HuggingFaceTokenizer):
        plain, whole = tokenizer.encode("a"), tokenizer.encode_as_model_input("a")
        begins = tokenizer.bos_id is not None and whole[:1] == [tokenizer.bos_id] != plain[:1]
        ends = whole[-1:] == [tokenizer.eos_id] != plain[-1:]
        if len(whole) != len(plain) + begins + ends:
            raise InputError(
                "tokenizer: it puts more around a text than the token that begins one and the one "
                "that ends one, which is all that llama.cpp does; give another"
            )
        for name in ("unk", "pad"):
            if (number := getattr(tokenizer.hf, f"{name}_token_id", None)) is not None:
                theirs = {"unk": "unknown", "pad": "padding"}[name]
                keys[f"{_START}{theirs}_token_id"] = number
        if isinstance(template := getattr(tokenizer.hf, "chat_template", None), str):
            keys["tokenizer.chat_template"] = template
    keys[f"{_START}add_bos_token"] = begins
    keys[f"{_START}add_eos_token"] = ends
    return keys
