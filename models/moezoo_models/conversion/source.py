"""A dense Hugging Face directory: checked from headers only, then read tensor by tensor.

Its weights are safetensors, or files of ``torch.save``, of which only tensors are unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from moezoo.errors import InputError
from moezoo.feed_forward import select_layers
from moezoo_models.checkpoints.dense import (
    DENSE_CONFIGS,
    MIXTURES,
    WITH_MORE,
    dense_config,
    dense_layout,
    dense_stock_config,
)
from moezoo_models.families.unknown import instead
from moezoo_models.files.gate import admit, is_pickled
from moezoo_models.files.model_files import (
    CONFIG,
    TensorInfo,
    check_finite,
    check_weights,
    reading,
)
from moezoo_models.files.pickled import read_pickled
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig

FAMILIES: dict[str, type[PreTrainedConfig]] = DENSE_CONFIGS
"""Configurations of the dense architectures that can be converted, by ``model_type``."""

_KINDS = ("F32", "BF16", "F16")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PIECE = 1 << 20


@dataclass
class Source:
    """A dense model on disk, open for reading.

    Attributes:
        directory: where it is.
        raw: its parsed ``config.json``.
        config: the same as transformers' configuration.
        ours: the same as ours.
        tensors: all of them, under our names, in the order of the model.
    """

    directory: Path
    raw: dict[str, Any]
    config: Any
    ours: MoezooConfig
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
        return int(self.ffn["d_ff"])

    @property
    def ffn(self) -> dict[str, Any]:
        """What the dense blocks are, as arguments of :class:`moezoo.DenseFFN`."""
        arguments: dict[str, Any] = self.ours.ffn[0]["init_args"]
        return arguments

    def block_options(self) -> dict[str, Any]:
        """Return activation, gating and biases of the dense blocks, by the names of a mixture's."""
        return {name: self.ffn[name] for name in ("activation", "gated", "bias")}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense blocks."""
        return self.tensors[projection_name(0, "up")].dtype

    def select(self, layers: str | int | list[int]) -> tuple[int, ...]:
        """Return the numbers of the blocks that a rule chooses, as of :func:`moezoo.select_layers`.

        Raises:
            InputError: the rule is not of that form, or chooses none.
        """
        if chosen := select_layers(layers, self.num_layers):
            return tuple(chosen)
        raise InputError(
            f"layers: {layers!r} selects none of {self.num_layers} layers; give all, every 2, "
            "or numbers from 0"
        )

    def read(self, name: str) -> Tensor:
        """Map a tensor of the files into memory; its pages are read when they are touched.

        Raises:
            InputError: it holds a NaN or an infinity, or its file is not what was written.
        """
        tensor, part = self.stored(name)[1], self.tensors[name].part
        tensor = tensor if part is None else part.of(tensor)
        if name not in self._checked:
            check_finite(name, tensor, self.directory)
            self._checked.add(name)
        return tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor as it is, for what is written of it as it is; see :meth:`read`."""
        yield self.read(name)

    def stored(self, name: str) -> tuple[str, Tensor]:
        """Return the tensor of the files that one of ours is, or is a part of, and its name there.

        It is mapped as :meth:`read` does; whether its numbers are finite is not looked at.
        """
        file, part = self.tensors[name].file, self.tensors[name].part
        if file not in self._files:
            self._files[file] = self._open(file)
        theirs = name if part is None else part.name
        return theirs, self._files[file](theirs)

    def _open(self, file: Path) -> Callable[[str], Tensor]:
        if is_pickled(file):
            return read_pickled(file).__getitem__
        check_weights([file])
        with reading(file):
            opened: Any = self._stack.enter_context(safe_open(file, framework="pt"))
        return cast("Callable[[str], Tensor]", opened.get_tensor)

    def block(self, layer: int) -> dict[str, Tensor]:
        """Read the dense block of a layer: ``gate`` and ``up`` (F, D), ``down`` (D, F).

        Without ``gate`` where it is a plain MLP; with ``bias_in`` (F,) and ``bias_out`` (D,) where
        it has biases.
        """
        names = ("gate", "up", "down") if self.ffn["gated"] else ("up", "down")
        found = {each: self.read(projection_name(layer, each)) for each in names}
        if self.ffn["bias"]:
            for each, of in (("bias_in", "up"), ("bias_out", "down")):
                found[each] = self.read(projection_name(layer, of, "bias"))
        return found

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


def projection_name(layer: int, projection: str, kind: str = "weight") -> str:
    """Name the weight, or the bias, of a dense block's projection."""
    return f"model.layers.{layer}.mlp.{projection}_proj.{kind}"


def layer_of(name: str) -> int | None:
    """Return which block a tensor belongs to; None for those outside."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def open_source(path: str | Path, families: Iterable[str] = FAMILIES) -> Source:
    """Open a dense model that passes the gate; of its weights, only headers are read.

    Args:
        path: its directory.
        families: dense architectures that are wanted, by ``model_type``.

    Raises:
        InputError: no checkpoint there, an architecture that cannot be converted, quantised
            weights, biases in the feed-forward blocks, files that are missing or damaged, or
            tensors that do not fit the configuration.
    """
    admitted = admit(
        path,
        partial(_config, list(families), Path(path)),
        MoezooForCausalLM,
        pickled=True,
        sealed=False,
        kinds=_KINDS,
        layout=dense_layout,
    )
    stock, ours = dense_stock_config(admitted.raw), admitted.config
    return Source(admitted.directory, admitted.raw, stock, ours, admitted.tensors)


def _config(families: list[str], directory: Path, raw: dict[str, Any]) -> MoezooConfig:
    kind = str(raw.get("model_type"))
    if kind not in families:
        raise InputError(_other(kind, families, directory))
    if raw.get("mlp_bias"):
        raise InputError(
            "mlp_bias: no stock mixture has biases in its experts, and dropping them would change "
            "the model; only gated blocks without biases can be converted"
        )
    config = dense_config(raw)
    if config.parallel != "none":
        raise InputError(
            "use_parallel_residual: what is converted reads what attention has added to, and in "
            "this model it reads the same as attention; give one whose parts follow each other"
        )
    return config


def _other(kind: str, families: list[str], directory: Path) -> str:
    """Return why an architecture is not one of those that can be converted."""
    known = ", ".join(families)
    if kind == MoezooConfig.model_type:
        return (
            f"model_type: '{kind}' is this library's own; write a dense model as a stock one "
            f"first: moezoo export {directory} NEW_DIRECTORY"
        )
    if kind in MIXTURES:
        return f"model_type: '{kind}' is a mixture of experts already; give one of: {known}"
    if kind in FAMILIES:
        return f"model_type: a {kind} cannot be converted this way; give one of: {known}"
    if kind in WITH_MORE:
        return WITH_MORE[kind]
    return f"model_type: '{kind}' cannot be converted{instead(kind, families)}"
