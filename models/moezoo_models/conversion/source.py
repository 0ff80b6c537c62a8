"""A dense Hugging Face directory: checked from headers only, then read tensor by tensor.

Its weights are safetensors, or files of ``torch.save``, of which only tensors are unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from moezoo.convert.plan import PROJECTIONS
from moezoo.errors import InputError, nearest
from moezoo_models.checkpoints import (
    CONFIG,
    check_weights,
    damaged,
    existing,
    quiet,
    read_json,
    weight_files,
)
from moezoo_models.conversion.pickled import read_pickled

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config
    for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Olmo2Config)
}
"""Configurations of the dense architectures that can be converted, by ``model_type``."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PIECE = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Source:
    """A dense model on disk, open for reading.

    Attributes:
        directory: where it is.
        raw: its parsed ``config.json``.
        config: the same as transformers' configuration.
        tensors: all of them, in the order of the model.
    """

    directory: Path
    raw: dict[str, Any]
    config: Any
    tensors: dict[str, TensorInfo]
    _files: dict[Path, Callable[[str], Tensor]] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    @property
    def family(self) -> str:
        """The architecture, as ``model_type`` calls it."""
        return self.config.model_type

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """The hidden width of a dense block."""
        return self.config.intermediate_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense blocks."""
        return self.tensors[projection_name(0, "gate")].dtype

    def read(self, name: str) -> Tensor:
        """Map a tensor of the files into memory; its pages are read when they are touched.

        Raises:
            InputError: it holds a NaN or an infinity, or its file is not what was written.
        """
        file = self.tensors[name].file
        if file not in self._files:
            self._files[file] = self._open(file)
        tensor = self._files[file](name)
        if name not in self._checked:
            for piece in tensor.reshape(-1).split(_PIECE):
                if not piece.isfinite().all():
                    raise InputError(
                        f"checkpoint: '{name}' in {file} holds NaN or infinity; "
                        "the weights are damaged"
                    )
            self._checked.add(name)
        return tensor

    def _open(self, file: Path) -> Callable[[str], Tensor]:
        if _is_pickled(file):
            return read_pickled(file).__getitem__
        check_weights([file])
        opened: Any = self._stack.enter_context(safe_open(file, framework="pt"))
        return opened.get_tensor

    def block(self, layer: int) -> dict[str, Tensor]:
        """Read the dense block of a layer: ``gate`` and ``up`` (F, D), ``down`` (D, F)."""
        return {each: self.read(projection_name(layer, each)) for each in PROJECTIONS}

    def fingerprint(self) -> str:
        """Hash the configuration, and the contents of all weight files."""
        digest = hashlib.sha256((self.directory / CONFIG).read_bytes())
        for file in sorted({info.file for info in self.tensors.values()}):
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                while piece := handle.read(_PIECE):
                    digest.update(piece)
        return digest.hexdigest()

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time of every weight file: a quick sign of a change."""
        files = sorted({info.file for info in self.tensors.values()})
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def projection_name(layer: int, projection: str) -> str:
    """Name the weight of a dense block's projection."""
    return f"model.layers.{layer}.mlp.{projection}_proj.weight"


def layer_of(name: str) -> int | None:
    """Tell which block a tensor belongs to; None for those outside."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def open_source(path: str | Path) -> Source:
    """Open a dense model and check all of it that headers tell: nothing is read yet.

    Args:
        path: its directory.

    Raises:
        InputError: no checkpoint there, an architecture that can not be converted, quantised
            weights, biases in the feed-forward blocks, files that are missing or damaged, or
            tensors that do not fit the configuration.
    """
    directory = existing(Path(path))
    raw = read_json(directory / CONFIG)
    config = _config(raw)
    found = _headers(directory)
    expected = _expected(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in found:
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(
                f"checkpoint: '{name}' is not a tensor of a {config.model_type} with this "
                f"{CONFIG}; weights and configuration are of different models"
            )
    for name, shape in expected.items():
        if name not in found:
            if name in tied:
                continue
            raise InputError(f"checkpoint: '{name}' is missing from the weights")
        if found[name].shape != shape:
            raise InputError(
                f"checkpoint: '{name}' has shape {found[name].shape}, by {CONFIG} {shape}"
            )
    # A tied head that was saved all the same would come back as a second embedding.
    kept = {name: found[name] for name in expected if name in found and name not in tied}
    return Source(directory, raw, config, kept)


def _config(raw: dict[str, Any]) -> Any:
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        hint = nearest(kind, FAMILIES) or f"; choose from: {', '.join(FAMILIES)}"
        raise InputError(f"model_type: '{kind}' can not be converted{hint}")
    if raw.get("quantization_config"):
        raise InputError("quantization_config: quantised weights can not be cut; dequantise them")
    try:
        config: Any = FAMILIES[kind].from_dict(dict(raw))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"{CONFIG}: {' '.join(str(error).split())}") from error
    if getattr(config, "mlp_bias", False):
        raise InputError(
            "mlp_bias: no stock mixture has biases in its experts, and dropping them would change "
            "the model; only dense blocks without biases can be converted"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"hidden_act: '{config.hidden_act}' is not silu, which all targets have")
    return config


def _headers(directory: Path) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in weight_files(directory, pickled=True):
        for name, shape, kind in _header(file):
            if kind not in _DTYPES:
                raise InputError(
                    f"checkpoint: '{name}' is {kind}; cast the weights to {', '.join(_DTYPES)}"
                )
            found[name] = TensorInfo(file, shape, _DTYPES[kind])
    return found


def _is_pickled(file: Path) -> bool:
    return file.suffix != ".safetensors"


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if _is_pickled(file):
        for name, tensor in read_pickled(file).items():
            yield name, tuple(tensor.shape), _KINDS.get(tensor.dtype, str(tensor.dtype))
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise InputError(damaged(file, error)) from error


def _expected(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
