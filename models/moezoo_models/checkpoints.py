"""Checkpoints: Hugging Face directories with config.json, safetensors and a tokenizer.

Saving is atomic. Loading checks names and shapes of all tensors before it reads any, compares
checksums, unpickles nothing and imports no code that a checkpoint names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from moezoo.atomic import named_errors
from moezoo.errors import InputError
from moezoo_models.atomic import replacing_directory
from moezoo_models.causal_lm import MoezooForCausalLM
from moezoo_models.checksums import check_seal, seal
from moezoo_models.config import MoezooConfig
from moezoo_models.dense import dense_config
from moezoo_models.finite import check_finite
from moezoo_models.tokenizer import Tokenizer, load_tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

Shapes = dict[str, tuple[int, ...]]


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
        model: the model.
        tokenizer: written into the same directory.
        max_shard_size: start another safetensors file when one exceeds this.
        state_dict: what to write instead of the model's own tensors.

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
    """Let transformers write a model, and seal its files.

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
        with quiet():
            model.save_pretrained(fresh, **options)
    except SafetensorError as error:
        raise InputError(
            f"checkpoint: {target} can not be written ({one_line(error)}); free space or "
            "give another directory"
        ) from error
    for file in fresh.glob("*.safetensors"):
        with named_errors(target):
            seal(file)


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> tuple[MoezooForCausalLM, Tokenizer | None]:
    """Load a checkpoint of ours, or a dense Llama, Mistral, Qwen2 or Qwen3 directory as ours.

    Args:
        path: the directory.
        device: where to put the model.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers;
            default sdpa.

    Returns:
        The model in evaluation mode, in the dtype it was saved in, and the tokenizer, or None if
        the directory holds none.

    Raises:
        InputError: no checkpoint there, a damaged or foreign one, or one whose weights do not fit
            its config.json.
    """
    directory = existing(Path(path))
    config = read_config(directory)
    config._attn_implementation = attention
    with torch.device("meta"):
        expected: Shapes = {
            name: tuple(tensor.shape)
            for name, tensor in MoezooForCausalLM(config).state_dict().items()
        }
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = tensor_shapes(directory)
    check_weights(weight_files(directory))
    _compare(expected, found, optional)
    with quiet():
        model = MoezooForCausalLM.from_pretrained(
            directory, config=config, local_files_only=True, use_safetensors=True
        )
    return model.to(device), read_tokenizer(directory)


def load_with_tokenizer(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> tuple[MoezooForCausalLM, Tokenizer]:
    """Load a checkpoint for text: with its own tokenizer, or one from elsewhere.

    Raises:
        InputError: as :func:`load_checkpoint`; or there is no tokenizer.
    """
    model, own = load_checkpoint(path, device, attention)
    return model, choose_tokenizer(path, tokenizer, own)


def choose_tokenizer(
    path: str | Path, tokenizer: str | Path | None, own: Tokenizer | None
) -> Tokenizer:
    """Load the tokenizer that is asked for, else take a checkpoint's own.

    Raises:
        InputError: there is neither.
    """
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if own is None:
        raise InputError(
            f"checkpoint: {path} holds no tokenizer; copy its files there or set tokenizer"
        )
    return own


def read_config(directory: Path) -> MoezooConfig:
    """Read ``config.json``, of ours or of a dense model.

    Raises:
        InputError: it is not JSON, or not a configuration that can be loaded.
    """
    raw = read_json(directory / CONFIG)
    if raw.get("model_type") != MoezooConfig.model_type:
        return dense_config(raw)
    try:
        return MoezooConfig.from_dict(raw)
    except InputError as error:
        raise InputError(f"{directory / CONFIG}: {error}") from error


def tensor_shapes(directory: Path) -> Shapes:
    """Read names and shapes of all tensors of a checkpoint from the headers of its files.

    Raises:
        InputError: there are no safetensors files, or one is missing, truncated or damaged.
    """
    shapes: Shapes = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(damaged(file, error)) from error
    return shapes


def check_weights(files: Iterable[Path]) -> None:
    """See that safetensors files are what was written, where they hold a checksum.

    Raises:
        InputError: one is not.
    """
    for file in files:
        try:
            check_seal(file)
        except (ValueError, OSError) as error:
            raise InputError(damaged(file, error)) from error


def read_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a checkpoint of any architecture, and nothing else of it.

    Raises:
        InputError: no checkpoint there, a damaged one, or one without that tensor.
    """
    directory = existing(Path(path))
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - not a mapping
                    check_weights([file])
                    return cast(Tensor, tensors.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise InputError(damaged(file, error)) from error
    raise InputError(f"checkpoint: {directory} has no tensor '{name}'; give another one")


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint; None if it has none."""
    there = any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)
    return load_tokenizer(path) if there else None


def damaged(file: Path, error: Exception) -> str:
    """Say in one line that a file of weights can not be read."""
    return f"checkpoint: {file} is truncated or damaged ({one_line(error)}); copy or save it again"


def one_line(error: BaseException) -> str:
    """Give the beginning of what a library says."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def existing(directory: Path) -> Path:
    """Return the directory if it holds a config.json, else raise :class:`InputError`."""
    if not directory.is_dir():
        what = "is a file" if directory.is_file() else "does not exist"
        raise InputError(f"checkpoint: {directory} {what}; give a directory with {CONFIG}")
    if not (directory / CONFIG).is_file():
        inner = directory / "model"
        hint = f"; did you mean {inner}?" if (inner / CONFIG).is_file() else ""
        raise InputError(f"checkpoint: {directory} holds no {CONFIG}{hint}")
    return directory


def weight_files(directory: Path, pickled: bool = False) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Args:
        directory: the checkpoint.
        pickled: where there are none, list PyTorch's own files, for who reads them safely.

    Raises:
        InputError: there are none, or the index names one that is missing.
    """
    for single in (WEIGHTS, PICKLED) if pickled else (WEIGHTS,):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            return [directory / single]
        if index.is_file():
            return _indexed(index)
    if pickles := sorted(directory.glob("*.bin")):
        raise InputError(
            f"checkpoint: {pickles[0]} would have to be unpickled, which can run any code; "
            "convert it to safetensors"
        )
    raise InputError(f"checkpoint: {directory} holds neither {WEIGHTS} nor {INDEX}")


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"checkpoint: {index} has no weight_map; save it again")
    files = [index.with_name(name) for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"checkpoint: {file} is missing, but {index.name} names it; copy it")
    return files


def _compare(expected: Shapes, found: Shapes, optional: set[str]) -> None:
    """Refuse weights that are not those of the configuration, naming the first difference."""
    # Llama checkpoints of old carry the rotary frequencies, which follow from the configuration.
    found = {n: shape for n, shape in found.items() if not n.endswith("rotary_emb.inv_freq")}
    missing = [name for name in expected if name not in found and name not in optional]
    unexpected = [name for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and found[name] != expected[name]]
    if reshaped:
        name = reshaped[0]
        problem = f"'{name}' has shape {found[name]}, by {CONFIG} {expected[name]}"
    elif missing:
        problem = f"'{missing[0]}' is missing from the weights"
    elif unexpected:
        problem = f"'{unexpected[0]}' is not a tensor of this model"
    else:
        return
    more = len(reshaped) + len(missing) + len(unexpected) - 1
    also = f" (and {more} more tensors differ)" if more else ""
    raise InputError(f"checkpoint: {problem}{also}; weights and {CONFIG} are of different models")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or raise :class:`InputError`."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint: {file} can not be read: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"checkpoint: {file} is not a JSON object")
    return raw


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
