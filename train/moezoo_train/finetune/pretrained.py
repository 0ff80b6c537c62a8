"""Starting a run from a directory: ours, carved or upcycled, or a stock model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moezoo.errors import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.files.gguf.copies import gguf_of
from moezoo_models.files.hub import fetched, is_hub_name
from moezoo_models.text.tokenizer import Tokenizer


def pretrained(
    path: str, vocab_size: int, attention: str, deferred: bool = False
) -> PreTrainedModel:
    """Load the model to go on from, in fp32: updates are too small for the numbers of bf16.

    Args:
        path: the directory.
        vocab_size: tokens of the data; the model may have more, which its tokenizer lacks.
        attention: attention backend.
        deferred: deferred initialization is refused, as the directory is read whole.

    Raises:
        InputError: no such checkpoint, a damaged or foreign one, or one with another vocabulary.
    """
    if deferred:
        raise InputError("build_in_parts: initialize_from reads a whole model; set it to false")
    try:
        model, tokenizer = load_as_it_is(path, attention=attention)
    except InputError as error:
        problem = str(error).removeprefix("checkpoint: ")
        raise InputError(f"initialize_from: {problem}") from error
    room = model.config.vocab_size
    expected = room if tokenizer is None else min(tokenizer.vocab_size, room)
    if vocab_size not in (expected, room):
        raise InputError(
            f"initialize_from: {path} has {expected} tokens, the data has {vocab_size}; "
            f"{_fix(path)}"
        )
    return model.float()


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Refuse data whose tokens mean something else to the model that a run begins with.

    Raises:
        InputError: the directory has a tokenizer, which is another one.
    """
    own = read_tokenizer(path)
    if own is not None and own.fingerprint() != tokenizer.fingerprint():
        raise InputError(
            f"initialize_from: {path} has another tokenizer than the data, of as many tokens; "
            f"{_fix(path)}"
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences that are longer than a model is made for.

    Raises:
        InputError: they are.
    """
    longest = model.config.max_position_embeddings
    if length > longest:
        raise InputError(
            f"data.sequence_length: {length} is more than model.max_length {longest}; raise "
            "model.max_length"
        )


def remember_ends(model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:
    """Set the model's begin and end tokens, which generation has to know.

    Those that a stock model knows stay: they may be several.
    """
    for name in ("bos", "eos"):
        token = getattr(tokenizer, f"{name}_id", None)
        field = f"{name}_token_id"
        ours = isinstance(model, MoezooForCausalLM)
        if token is not None and (ours or getattr(model.config, field) is None):
            setattr(model.config, field, token)
            setattr(model.generation_config, field, token)


def remember_length(model: PreTrainedModel, length: int, fresh: bool) -> None:
    """Write into a model's configuration on how many tokens at once it is trained.

    One that was trained before keeps a larger length, or stays without where it had none: what it
    learned at first is not known.
    """
    config: Any = model.config
    known = getattr(config, "trained_length", None)
    if fresh:
        config.trained_length = length
    elif known is not None:
        config.trained_length = max(length, known)


def default_tokenizer(path: str | None) -> str | None:
    """Return the directory a run begins from, as the data's tokenizer, if it holds one."""
    if path is None or not (is_hub_name(path) or Path(path).is_dir() or gguf_of(Path(path))):
        return None
    if read_tokenizer(path) is None:
        return None
    return str(fetched(path)) if is_hub_name(path) else path


def _fix(path: str) -> str:
    return f"prepare the data with its tokenizer: --data.tokenizer {path}"
