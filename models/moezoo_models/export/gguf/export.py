"""`moezoo export DIR FILE.gguf`: what we train and convert, for llama.cpp."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import replacing_file
from moezoo_models.checkpoints.directory import (
    CONFIG,
    choose_tokenizer,
    existing,
    quiet,
    read_json,
    read_tokenizer,
)
from moezoo_models.checkpoints.locks import check_file
from moezoo_models.export.gguf.architectures import Keys, architecture_of, keys_of, num_experts_of
from moezoo_models.export.gguf.comparing import compare_encodings
from moezoo_models.export.gguf.encoding import check_dtype, encoding_of
from moezoo_models.export.gguf.file import write_file
from moezoo_models.export.gguf.library import library
from moezoo_models.export.gguf.rounding import Rounded, measure_rounding
from moezoo_models.export.gguf.tensors import stored_tensors
from moezoo_models.export.gguf.vocabulary import changes_text, vocabulary_keys
from moezoo_models.export.stock import write_stock
from moezoo_models.files.gate import Admitted, admit
from moezoo_models.model.config import MoezooConfig
from moezoo_models.text.reading import read_text

GGUF_SUFFIX = ".gguf"
"""By which a target is known to be a GGUF file."""


def export_gguf(
    checkpoint: str | Path,
    target: str | Path,
    dtype: str = "f16",
    tokenizer: str | Path | None = None,
    text: str | Path | None = None,
) -> Path:
    """Write a model as a GGUF file, tokenizer and all; an interruption leaves none.

    Args:
        checkpoint: directory of a stock model, or of one of ours whose layers a stock one has.
        target: file to make.
        dtype: f32, f16 or q8_0, of matrices; vectors and routers are always in F32.
        tokenizer: directory of the tokenizer; default: the checkpoint's own.
        text: file in UTF-8; print the perplexity on it before and after rounding to ``dtype``.

    Returns:
        The file.

    Raises:
        InputError: the gguf package is not installed, llama.cpp would compute something else, the
            directory is damaged, or ``target`` is there already.
    """
    check_dtype(dtype)
    file = Path(target)
    check_file(file, "target")
    _check_new(file)
    library()
    content = None if text is None else read_text(Path(text))
    with _as_stock(existing(Path(checkpoint)), file) as directory:
        admitted = admit(directory, _configure, _build, renamed=True, pickled=True)
        architecture = architecture_of(admitted.config)
        words = choose_tokenizer(checkpoint, tokenizer, read_tokenizer(directory))
        tensors = stored_tensors(admitted, architecture)
        vocabulary = vocabulary_keys(words, admitted.config.vocab_size)
        compared = compare_encodings(vocabulary, words, composed=changes_text(words))
        keys = _keys(admitted, architecture.name, vocabulary, Path(checkpoint).absolute().name)
        rounded = None if content is None else measure_rounding(directory, words, content, dtype)
        with replacing_file(file, "target") as fresh:
            _check_new(file)  # another process may have just made it
            with admitted.opened() as opened:
                write_file(fresh, architecture.name, keys, tensors, opened, dtype, file)
        size = sum(info.numel for info in admitted.tensors.values())
        print(f"{architecture.name:<12}{size / 1e6:,.3g} M parameters, {dtype}, {file}")
        halves = [t.name for t in tensors if dtype == "q8_0" and encoding_of(t, dtype) == "f16"]
        if halves:
            print(
                f"f16: {len(halves)} tensors, as blocks of 32 do not divide their rows: {halves[0]}"
            )
        print(f"tokenizer: {compared}")
        if changes_text(words):
            print("tokenizer: it composes characters (NFC); llama.cpp takes a text as it is")
        _say_rounding(admitted, dtype, rounded, text)
    return file


def _check_new(file: Path) -> None:
    if file.exists():
        raise InputError(f"target: {file} is there already; name a new file")


@contextmanager
def _as_stock(directory: Path, file: Path) -> Iterator[Path]:
    """Yield the directory of a stock model: the given one, or what a model of ours is as one.

    The latter is beside the file that is made, and is removed at the end.
    """
    if read_json(directory / CONFIG).get("model_type") != MoezooConfig.model_type:
        yield directory
        return
    beside = next(parent for parent in file.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{file.name}.stock-") as folder:
        stock = Path(folder) / "model"
        write_stock(directory, stock)
        yield stock


def _configure(raw: dict[str, Any]) -> Any:
    kind = str(raw.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise InputError(f"model_type: transformers does not know '{kind}'")
    config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    architecture_of(config)
    return config


def _build(config: Any) -> Any:
    with quiet(), warnings.catch_warnings():
        # An absent shared expert is, in stock architectures, one without neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _keys(admitted: Admitted, name: str, vocabulary: Keys, title: str) -> Keys:
    """Return all keys of the file, by their full names."""
    own = {f"{name}.{key}": value for key, value in keys_of(admitted.config).items()}
    ends = getattr(admitted.generation or admitted.config, "eos_token_id", None)
    eos = vocabulary["tokenizer.ggml.eos_token_id"]
    room = range(admitted.config.vocab_size)  # published configurations have others for none
    more = [e for e in (ends if isinstance(ends, list) else [ends]) if e in room and e != eos]
    turn = {"tokenizer.ggml.eot_token_id": more[0]} if more else {}
    return {"general.name": title, **own, **vocabulary, **turn}


def _say_rounding(
    admitted: Admitted, dtype: str, rounded: Rounded | None, text: str | Path | None
) -> None:
    """Print what rounding costs, or, of a mixture in Q8_0, that it was not measured."""
    if rounded is not None:
        figures = f"perplexity {rounded.after:,.3f}, before rounding {rounded.before:,.3f}"
        print(f"{dtype}: {figures}, {text}")
    elif dtype == "q8_0" and num_experts_of(admitted.config):
        print(
            "q8_0: what rounding costs was not measured; it can choose other experts, in carved "
            "models above all: --text FILE measures it"
        )
