"""Checkpoints: Hugging Face directories with config.json, safetensors and a tokenizer.

Saving is atomic. Every directory that is loaded has passed :mod:`moezoo_models.files.gate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from moezoo.atomic import named_errors
from moezoo.errors import InputError
from moezoo_models.adapters.transformers import set_attention_backend
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.dense import dense_config, dense_layout
from moezoo_models.checkpoints.dtypes import choose_dtype
from moezoo_models.checkpoints.finite import check_finite
from moezoo_models.files.checksums import seal
from moezoo_models.files.gate import EMBEDDINGS, HEAD, admit
from moezoo_models.files.gguf.copies import directory_of
from moezoo_models.files.model_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_weights,
    damaged,
    existing,
    one_line,
    read_json,
    read_tensor,
    weight_files,
)
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "check_weights",
    "choose_tokenizer",
    "damaged",
    "existing",
    "load_checkpoint",
    "load_with_tokenizer",
    "one_line",
    "our_config",
    "quiet",
    "read_json",
    "read_tensor",
    "read_tokenizer",
    "save_checkpoint",
    "weight_files",
    "write_model",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def save_checkpoint(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    max_shard_size: str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint directory; an interruption leaves the earlier one, or none.

    Args:
        path: directory to make, or checkpoint to replace.
        model: ours or a stock one, on any device.
        tokenizer: written into the same directory.
        max_shard_size: start another safetensors file when one exceeds this, such as ``"5GB"``.
        state_dict: tensors to write instead of the model's own, by the same names.

    Returns:
        The directory.

    Raises:
        InputError: ``path`` is a file, or a directory that is no checkpoint; a tensor is not
            finite; or the disk is full.
    """
    directory = Path(path)
    if directory.is_symlink():
        directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"checkpoint: {directory} is a file; give a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise InputError(
            f"checkpoint: {directory} holds something that is no checkpoint; "
            "give an empty or new directory"
        )
    tensors = None if state_dict is None else dict(state_dict)
    with replacing_directory(directory) as fresh:
        write_model(fresh, directory, model, max_shard_size=max_shard_size, state_dict=tensors)
        if tokenizer is not None:
            tokenizer.save(fresh)
    return directory


def write_model(fresh: Path, target: Path, model: PreTrainedModel, **options: Any) -> None:
    """Write a model by transformers, and seal its files.

    Args:
        fresh: directory to write into.
        target: what it will be called, for messages.
        model: any of transformers'.
        options: of ``save_pretrained``.

    Raises:
        InputError: a tensor is not finite, or the disk is full.
    """
    check_finite((options.get("state_dict") or model.state_dict()).items(), target)
    try:
        with quiet(), _flag_as_written(model, options.get("state_dict")):
            model.save_pretrained(fresh, **options)
    except SafetensorError as error:
        raise InputError(
            f"checkpoint: {target} cannot be written ({one_line(error)}); free space or "
            "give another directory"
        ) from error
    for file in fresh.glob("*.safetensors"):
        with named_errors(target):
            seal(file)


@contextmanager
def _flag_as_written(
    model: PreTrainedModel, tensors: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """Have the configuration say whether the head is tied as the tensors that are written say it.

    Adapters of a tied head part it from the embeddings; and of tensors that share their memory only
    one is written.
    """
    config: Any = model.config
    state = model.state_dict() if tensors is None else tensors
    one, other = state.get(EMBEDDINGS), state.get(HEAD)
    tied = config.tie_word_embeddings
    try:
        if one is not None and other is not None:
            shared = one.data_ptr() == other.data_ptr() and one.numel() > 0
            config.tie_word_embeddings = shared or (tied and _same(one, other))
        yield
    finally:
        config.tie_word_embeddings = tied


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other.to(one.device)))


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    dtype: str | None = None,
) -> tuple[MoezooForCausalLM, Tokenizer | None]:
    """Load a checkpoint of ours, or a dense one of a known family as ours.

    Args:
        path: the directory.
        device: where to put the model.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers;
            default sdpa.
        dtype: of the weights, as for :func:`moezoo_models.checkpoints.dtypes.choose_dtype`;
            default: the one they were saved in.

    Returns:
        The model in evaluation mode, and the tokenizer, or None if the directory holds none.

    Raises:
        InputError: no checkpoint there, a damaged or foreign one, or one whose weights do not fit
            its config.json.
    """

    def configure(raw: dict[str, Any]) -> MoezooConfig:
        config = our_config(raw)
        set_attention_backend(config, attention)
        return config

    admitted = admit(path, configure, MoezooForCausalLM, layout=dense_layout)
    with quiet():
        model = MoezooForCausalLM.from_admitted(
            admitted, dtype=choose_dtype(admitted, dtype, device)
        )
    return model.to(device), read_tokenizer(admitted.directory)


def load_with_tokenizer(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    dtype: str | None = None,
) -> tuple[MoezooForCausalLM, Tokenizer]:
    """Load a checkpoint for text: with its own tokenizer, or one from elsewhere.

    Args:
        path: as for :func:`load_checkpoint`.
        tokenizer: directory of the tokenizer, or ``"hf:NAME"``; default: the checkpoint's own.
        device: as for :func:`load_checkpoint`.
        attention: as there.

    Returns:
        The model, as of :func:`load_checkpoint`, and the tokenizer.

    Raises:
        InputError: as :func:`load_checkpoint`; or there is no tokenizer.
    """
    model, own = load_checkpoint(path, device, attention, dtype)
    return model, choose_tokenizer(path, tokenizer, own)


def choose_tokenizer(
    path: str | Path, tokenizer: str | Path | None, own: Tokenizer | None
) -> Tokenizer:
    """Load the tokenizer that is asked for, else take a checkpoint's own.

    Raises:
        InputError: there is neither.
    """
    if tokenizer is not None:
        return _as_trained(directory_of(Path(path)), load_tokenizer(tokenizer))
    if own is None:
        raise InputError(
            f"checkpoint: {path} holds no tokenizer; copy its files there or set tokenizer"
        )
    return own


def our_config(raw: Mapping[str, Any]) -> MoezooConfig:
    """Make our configuration of a ``config.json``, of ours or of a dense model.

    Args:
        raw: its parsed contents.

    Raises:
        InputError: it is of another architecture, or a field is wrong.
    """
    if raw.get("model_type") != MoezooConfig.model_type:
        return dense_config(raw)
    return MoezooConfig.from_dict(dict(raw))


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint; None if it has none.

    Args:
        path: the directory, or a GGUF file.

    Raises:
        InputError: a file of the tokenizer is broken, or it has no end-of-text token.
    """
    directory = directory_of(Path(path))
    there = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return _as_trained(directory, load_tokenizer(directory)) if there else None


def _as_trained(directory: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Have texts begin as those that a model was trained on here, before its files said so."""
    config = directory / CONFIG
    if config.is_file() and read_json(config).get("trained_length") is not None:
        tokenizer.set_trained()
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars, one per file, off the screen, and DeepSpeed off the output.

    Where accelerate and DeepSpeed are installed, saving imports both, and DeepSpeed would write a
    line about missing GPUs into what a command prints.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
