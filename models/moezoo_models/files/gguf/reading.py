"""A GGUF file's model as transformers has it: configuration, names, tensors, tokenizer.

transformers 5.23 reads the keys that it knows, skips the tensors that have no place in its model,
and says nothing of either. So every key that says how the model computes is on a list here, and
every tensor has to have a place: a file that would come out as another model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.files.gguf.header import Array, Header

_READ = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "vocab_size",
    }
)
"""Keys of every architecture that are read here or by transformers."""

ARCHITECTURES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "qwen2": frozenset(),
    "qwen3": frozenset(),
    "gemma3": frozenset({"attention.sliding_window"}),
}
"""Architectures of llama.cpp that are read, each with its own keys beside those above."""

_GEMMA3_27B = 62
"""Blocks of the one Gemma 3 whose attention llama.cpp scales by another width than its heads'."""

_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none"}
"""Keys that change nothing as long as they have this value."""

_FREQUENCIES = "rope_freqs.weight"
_HEAD = "lm_head.weight"
# Llama 3.1 to 3.3; the file has no more than what follows from these.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GGUFModel:
    """What a file's model is in transformers.

    Attributes:
        header: of the file.
        config: transformers' configuration.
        names: of the file's tensors in transformers' model.
        process: brings a tensor into transformers' order, given its numbers and its name.
    """

    header: Header
    config: Any
    names: dict[str, str]
    process: Callable[..., Any]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that holds all weights exactly: fp32, or that of a file that is not quantized.

        Norms are written in fp32 beside matrices in half of that, and came from there.
        """
        half = {"F16": torch.float16, "BF16": torch.bfloat16}
        kinds = {tensor.kind for tensor in self.header.tensors.values()} - {"F32"}
        if len(kinds) != 1 or not kinds <= half.keys():
            return torch.float32
        dtype = half[kinds.pop()]
        wide = [n for n in self.names if self.header.tensors[n].kind == "F32"]
        exact = all(torch.equal(t.to(dtype).float(), t) for _, t in self.tensors(wide))
        return dtype if exact else torch.float32

    def tensors(self, only: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's tensors in fp32, one after the other, under transformers' names.

        Args:
            only: names in the file; default: all.
        """
        from gguf import GGUFReader, dequantize

        wanted = set(self.names if only is None else only)
        for tensor in GGUFReader(self.header.file).tensors:
            if tensor.name in wanted:
                numbers = dequantize(tensor.data, tensor.tensor_type)
                weights = self.process(weights=numbers, name=tensor.name).weights
                yield self.names[tensor.name], torch.from_numpy(weights.copy())


def read_model(header: Header) -> GGUFModel:
    """Find the model of transformers that a file holds.

    Raises:
        InputError: its architecture is not read here, or a key or a tensor of it would be lost.
    """
    _check_keys(header)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    with told(header.file), quiet():
        raw = load_gguf_checkpoint(str(header.file))["config"]
        raw.pop("_model_name_or_path", None)
        config = AutoConfig.for_model(**{**raw, **_more(header)})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        kind = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        processor = kind(config=config.to_dict())
        names = get_gguf_hf_weights_map(model, processor)
    config.architectures = [type(model).__name__]
    names = {name: there for name, there in names.items() if name in header.tensors}
    _check_tensors(header, {n: tuple(t.shape) for n, t in model.state_dict().items()}, names)
    _check_heads(header, config)
    return GGUFModel(header, config, names, processor.process)


def _check_keys(header: Header) -> None:
    """Refuse what transformers would read as something else."""
    file, kind = header.file, header.architecture
    parts = header.keys.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise InputError(
            f"checkpoint: {file} is one of {parts} parts; join them (llama-gguf-split --merge)"
        )
    if kind not in ARCHITECTURES:
        raise InputError(
            f"general.architecture: '{kind}' of {file} is not read; choose from: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    for name, value in header.keys.items():
        start, _, key = name.partition(".")
        if start != kind:
            continue
        if isinstance(value, Array):
            raise InputError(
                f"{name}: {file} has a list of {value.count} there, one per layer; only models "
                "whose layers are alike are read"
            )
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if key not in _READ | ARCHITECTURES[kind] or key in _NEUTRAL:
            raise InputError(
                f"{name}: {file} has {value!r} there, which transformers would not read and the "
                "model would lose; get the model as safetensors"
            )
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        if not isinstance(header.get(key), int) or header.get(key) < 1:
            raise InputError(f"{kind}.{key}: {file} has {header.get(key)!r} there; copy it again")
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if (count := header.get("block_count")) != len(blocks):
        raise InputError(
            f"{kind}.block_count: {file} has {count} there, and tensors of {len(blocks)}; copy it "
            "again"
        )


def _more(header: Header) -> dict[str, Any]:
    """Return fields of the configuration that transformers' reader leaves at their defaults."""
    fields: dict[str, Any] = {"dtype": "float32"}
    width, heads = header.get("embedding_length"), header.get("attention.head_count")
    fields["head_dim"] = header.get("attention.key_length", width // heads)
    if isinstance(epsilon := header.get("attention.layer_norm_rms_epsilon"), float):
        # As it was written in decimals before it became fp32; computed in fp32 it is the same.
        fields["rms_norm_eps"] = float(str(np.float32(epsilon)))
    if header.architecture == "gemma3":  # files do not say it
        large = header.get("block_count") == _GEMMA3_27B
        fields["query_pre_attn_scalar"] = width // heads if large else fields["head_dim"]
    if _FREQUENCIES in header.tensors:
        fields["rope_parameters"] = _llama3(header, fields["head_dim"])
    return fields


def _llama3(header: Header, head_dim: int) -> dict[str, Any]:
    """Find the rope parameters of Llama 3.1 that give the divisors of a file's frequencies."""
    from gguf import GGUFReader, dequantize

    (found,) = (t for t in GGUFReader(header.file).tensors if t.name == _FREQUENCIES)
    divisors = torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).double()
    theta, factor = float(header.get("rope.freq_base", 1e4)), float(divisors.max())
    fields = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
    if divisors.shape == (head_dim // 2,) and torch.allclose(
        divisors, llama3_divisors(head_dim, theta, factor), rtol=1e-4
    ):
        return fields
    raise InputError(
        f"{_FREQUENCIES}: {header.file} divides rotary frequencies in another way than Llama 3.1, "
        "which transformers would not read; get the model as safetensors"
    )


def llama3_divisors(head_dim: int, theta: float, factor: float) -> Tensor:
    """Return by what Llama 3.1 divides its rotary frequencies, ``(head_dim / 2,)`` fp64.

    1 for wavelengths below a quarter of the original context, ``factor`` above all of it, and
    between them smoothly from one to the other.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * theta**exponents
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _check_tensors(
    header: Header, wanted: dict[str, tuple[int, ...]], names: dict[str, str]
) -> None:
    """See that all of the file has a place in the model, and all of the model is in the file."""
    filled = set(names.values())
    if _HEAD not in filled:
        filled.add(_HEAD)  # tied: transformers reads it so where the file has no head
    for name in header.tensors:
        if name not in names and name != _FREQUENCIES:
            raise InputError(
                f"checkpoint: '{name[:80]}' in {header.file} has no place in transformers' "
                f"{header.architecture} and would be lost; get the model as safetensors"
            )
    for name in wanted:
        if name not in filled:
            raise InputError(
                f"checkpoint: '{name}' is not in {header.file}; the file is incomplete, get "
                "another one"
            )
    for name, there in names.items():
        if (found := header.tensors[name].shape) != wanted[there]:
            raise InputError(
                f"checkpoint: '{name}' in {header.file} has shape {found}, by its keys "
                f"{wanted[there]}; the file is damaged, copy it again"
            )


def _check_heads(header: Header, config: Any) -> None:
    """See that all of each attention head is rotated, and that keys and values are as wide."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if (found := header.get(key, width)) != width:
            raise InputError(
                f"{header.architecture}.{key}: {header.file} has {found} there and heads of "
                f"{width}; transformers' model has {width} everywhere"
            )


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Turn what libraries raise for a file's contents into one line."""
    try:
        yield
    except (InputError, ImportError, OSError):
        raise
    except BaseException as error:
        # The tokenizers library raises one that is no Exception where it stumbles.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        said = f"{said} is missing from it" if isinstance(error, KeyError) else said
        raise InputError(f"checkpoint: {file}: {said}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and hints off the screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
