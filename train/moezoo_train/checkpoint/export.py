"""`moezoo export`: training checkpoints as directories, models as stock ones and GGUF files."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moezoo.errors import InputError
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.checkpoints.directory import one_line, read_tokenizer, save_checkpoint
from moezoo_models.checkpoints.export import making
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.export.gguf import GGUF_SUFFIX, export_gguf
from moezoo_models.export.standalone.export import export_with_code
from moezoo_models.export.stock import export_stock
from moezoo_models.files.checksums import check_archive
from moezoo_models.files.gguf.header import is_gguf
from moezoo_models.text.tokenizer import Tokenizer, load_tokenizer
from moezoo_train.checkpoint.identity import check_tensors
from moezoo_train.checkpoint_structure import CONFIG_KEY, check_structure
from moezoo_train.finetune.lora import (
    LoRAOptions,
    add_adapters,
    merged_state,
    trained_state,
    weights_hash,
)
from moezoo_train.finetune.neurons import NeuronOptions, slice_neurons, whole_state
from moezoo_train.parallel.sharded_checkpoints import REST, is_sharded_checkpoint, load_sharded

_PREFIX = "model."
"""Prefix of the names of the model's tensors in a training checkpoint."""


class TrainedModel(NamedTuple):
    """The description of the model in a training checkpoint.

    Attributes:
        config: fields of the configuration.
        lora: the adapted modules, and the hash of the model they are for; empty without.
        state: the tensors, by their names in the model; those of a file stay on the disk until
            they are used.
        neurons: the same as ``lora`` for slices of neurons.
    """

    config: dict[str, Any]
    lora: dict[str, Any]
    state: dict[str, Tensor]
    neurons: dict[str, Any] = {}  # noqa: RUF012 - never changed


def export(
    checkpoint: str | Path,
    target: str | Path,
    tokenizer: str | None = None,
    base: str | None = None,
    format: Literal["stock", "gguf"] | None = None,
    dtype: Literal["f32", "f16", "q8_0"] | None = None,
    text: str | None = None,
    with_code: bool = False,
) -> Path:
    """Write a training checkpoint as a model directory, or a model as a stock one or a GGUF file.

    A checkpoint of any strategy will do: a file, or a directory of which each process wrote a part.
    One process without a GPU puts it together; the optimizer's state is not read.

    A model of ours is written as the stock one that computes the same, so that programs that know
    the stock architecture can read it: Llama, Mistral, Qwen2 or Qwen3 if it is dense; Mixtral,
    Qwen2-MoE, Qwen3-MoE, GLM4-MoE or GraniteMoE if it is a mixture.

    What no stock architecture computes is written with_code: with a file of plain torch, by which
    transformers runs it where moezoo is not installed.

    A GGUF file is for llama.cpp. It is written of these and of stock models, if llama.cpp computes
    the same.

    Args:
        checkpoint: of a run, e.g. ``runs/moe/checkpoints/last.ckpt``, or the directory of a model.
        target: directory to make, or file that ends in .gguf.
        tokenizer: of a training checkpoint: directory or file of the one it was trained with, to
            be written along; default: that of ``model/`` in the same run. Of a GGUF file: directory
            of the tokenizer; default: the model's own.
        base: of a training checkpoint of adapters or neurons: the directory they were trained on.
        format: of a model: stock or gguf; default: gguf if the target ends in .gguf, else stock.
        dtype: of the matrices of a GGUF file: f32, f16 (the default) or q8_0.
        text: of a GGUF file: text in UTF-8 on which perplexity is measured, before and after
            rounding to dtype.
        with_code: write a model of ours as it is, with the code that runs it.

    Returns:
        The directory, or the file.

    Raises:
        InputError: no such checkpoint, a damaged or incomplete one, or one of something else;
            ``target`` is there already; no stock architecture computes the same, or llama.cpp does
            not; an option is for something else.
    """
    path = Path(checkpoint)
    trained = is_training_checkpoint(path)
    if trained and (format is not None or Path(target).suffix == GGUF_SUFFIX):
        name = "target" if format is None else "format"
        raise InputError(
            f"{name}: a training checkpoint is written as a directory first: export {path} to one, "
            "and then the directory"
        )
    gguf = format == "gguf" or (format is None and Path(target).suffix == GGUF_SUFFIX)
    for name, value in (("dtype", dtype), ("text", text)):
        if value is not None and not gguf:
            raise InputError(f"{name}: is for GGUF files; leave it out, or end the target in .gguf")
    if with_code and (trained or format is not None or gguf):
        raise InputError(f"with_code: is for directories of models; {_instead(path, trained)}")
    if not trained:
        for name, value in (("tokenizer", tokenizer), ("base", base)):
            if value is not None and not (gguf and name == "tokenizer"):
                raise InputError(f"{name}: is for training checkpoints; {path} is none")
        if with_code:
            return export_with_code(path, target)
        if gguf:
            return export_gguf(path, target, dtype or "f16", tokenizer, text)
        return export_stock(path, target)
    with making(target) as directory:
        found = read_model(path)
        added = found.lora or found.neurons
        model = _add(found, base) if added else _build(found)
        merged = whole_state if found.neurons else merged_state
        state = merged(model) if added else None
        own = _tokenizer(path, tokenizer, model.config.vocab_size)
        save_checkpoint(directory, model, own, state_dict=state)
    size = f"{model.num_parameters() / 1e6:,.3g} M parameters"
    print(f"{model.config.model_type:<8}{size}, {directory}")
    if own is None:
        print("It has no tokenizer: the run left none; name the one of its data by --tokenizer")
    return directory


def _instead(path: Path, trained: bool) -> str:
    if trained:
        return f"export {path} to one first, and then the directory"
    return "leave it out, or format and the ending .gguf"


def is_training_checkpoint(path: Path) -> bool:
    """Return whether a path is, or is named as, a checkpoint of a run; there need not be one."""
    file = path.is_file() and not is_gguf(path)
    return path.suffix == ".ckpt" or file or is_sharded_checkpoint(path)


def read_model(path: Path) -> TrainedModel:
    """Read what a training checkpoint says about its model.

    Raises:
        InputError: there is none, it is damaged or incomplete, or not of ``moezoo fit``.
    """
    if not path.exists():
        raise InputError(f"checkpoint: there is no {path}; name another")
    if path.is_dir() and not is_sharded_checkpoint(path):
        raise InputError(f"checkpoint: {path} is incomplete, it has no {REST}; use another")
    with _about("checkpoint"):
        raw = load_sharded(path, model_only=True) if path.is_dir() else _map(path)
    known = raw.get(CONFIG_KEY) if isinstance(raw, dict) else None
    if known is None:
        raise InputError(f"checkpoint: {path} was not written by moezoo fit; name another")
    state = {n.removeprefix(_PREFIX): tensor for n, tensor in raw["state_dict"].items()}
    # What earlier versions did not write: end tokens and the like, and adapters.
    config = known["config"] | known.get("unrelated", {})
    return TrainedModel(config, known.get("lora", {}), state, known.get("neurons", {}))


def _map(file: Path) -> Any:
    try:
        check_archive(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(checkpoint, dict) and CONFIG_KEY in checkpoint:
            check_structure(checkpoint)
        return checkpoint
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint: {file} is damaged or not a checkpoint ({one_line(error)}); use another, "
            "e.g. best.ckpt beside it"
        ) from error


def _build(trained: TrainedModel) -> PreTrainedModel:
    """Put a model together around the tensors of its checkpoint, which are not copied."""
    fields = dict(trained.config)
    kind = fields.pop("model_type", MoezooConfig.model_type)
    model: Any
    with _described(), torch.device("meta"), warnings.catch_warnings():
        # An absent shared expert is, in stock architectures, one without neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        if kind == MoezooConfig.model_type:
            model = MoezooForCausalLM(MoezooConfig(**fields))
        else:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(kind, **fields), trust_remote_code=False
            )
    with _about("checkpoint"):
        check_tensors(trained.state, model.state_dict())
    model.load_state_dict(trained.state, assign=True)
    model.tie_weights()
    return cast(PreTrainedModel, model)


def _add(trained: TrainedModel, base: str | None) -> PreTrainedModel:
    """Put adapters, or slices of neurons, on the model they were trained on."""
    what = "adapters" if trained.lora else "neurons"
    if base is None:
        raise InputError(
            f"base: the checkpoint holds {what} only; give the directory that they were trained "
            "on, which was model.initialize_from"
        )
    options = dict(trained.lora or trained.neurons)
    hashed = options.pop("base")
    with _about("base"):
        model, _ = load_as_it_is(base)
    model = model.float()
    if weights_hash(model) != hashed:
        raise InputError(
            f"base: {base} is not the model that the {what} were trained on; give that one"
        )
    if trained.lora:
        add_adapters(model, LoRAOptions(**options), base)
    else:
        slice_neurons(model, NeuronOptions(**options), base)
    with _about("checkpoint"):
        check_tensors(trained.state, trained_state(model))
    model.load_state_dict(trained.state, strict=False)
    return model


def _tokenizer(path: Path, given: str | None, room: int) -> Tokenizer | None:
    """Load the tokenizer that is named, else the one that the run has left."""
    own = read_tokenizer(path.absolute().parents[1] / "model") if given is None else None
    tokenizer = own if given is None else load_tokenizer(given)
    if tokenizer is not None and tokenizer.vocab_size > room:
        raise InputError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model {room}; give the one that "
            "it was trained with"
        )
    return tokenizer


@contextmanager
def _described() -> Iterator[None]:
    """Raise errors about a checkpoint's configuration as one line."""
    try:
        yield
    # Transformers checks some fields, and stumbles over others.
    except Exception as error:
        raise InputError(
            f"checkpoint: no model can be built from the configuration in it ({one_line(error)}); "
            "use another"
        ) from error


@contextmanager
def _about(field: str) -> Iterator[None]:
    """Prefix the field that an error names with its place here."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {str(error).partition(': ')[2]}") from error
