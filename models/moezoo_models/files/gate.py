"""The gate that every model directory passes before any command uses it.

Cheap checks come first: names of files, ``config.json``, and the headers of the weights; then
whether they are of one model; and last those that read the weights, their checksums and the tied
head. Whether numbers are finite is seen where they are read. A directory that passes is loaded
from the tensors that were looked at here: transformers is not told its path, so that nothing in it
can name other files, adapters or code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from moezoo.errors import InputError, check_int
from moezoo.layers.hash import HashLayer
from moezoo.layers.l3 import L3
from moezoo_models.adapters.transformers import keep_contradictions
from moezoo_models.files.fields import LARGEST_SIZE, STEERING, check_fields, check_heads
from moezoo_models.files.layout import PartOfFile, Rule, arranged
from moezoo_models.files.model_files import (
    ADAPTERS,
    CONFIG,
    DTYPES,
    GENERATION,
    INDEX,
    KINDS,
    TensorInfo,
    check_finite,
    check_weights,
    existing,
    indexed,
    read_headers,
    read_json,
    reading,
    weight_files,
)
from moezoo_models.files.pickled import read_pickled

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_LAYER = re.compile(r"(?:[a-z]+\.){0,2}(?:layers|h)\.(\d{1,9})\.")
_FLOATS = tuple(kind for kind, dtype in DTYPES.items() if dtype.is_floating_point)
_FUSED = (".mlp.", ".block_sparse_moe.")
_FLAGS = ("use_cache", "output_attentions", "output_hidden_states")
_ROWS = 1024
_MOST_AT_ONCE = 1024
# What a user's file cannot cause, but a mistake of ours can.
_BUGS = (NameError, AssertionError, ImportError)


@dataclass(frozen=True)
class Admitted:
    """A directory that passed the gate.

    Attributes:
        directory: where it is.
        raw: its parsed ``config.json``.
        config: made of that, or given.
        tensors: what the headers say of the model's tensors, in its order; those that follow from
            others are left out.
        generation: its ``generation_config.json``, if it has one.
    """

    directory: Path
    raw: dict[str, Any]
    config: Any
    tensors: dict[str, TensorInfo]
    generation: GenerationConfig | None

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the configuration asks for, else that of the first tensor."""
        named: torch.dtype | None = getattr(self.config, "dtype", None)
        found = (info.dtype for info in self.tensors.values() if info.kind in _FLOATS)
        return named or next(found)

    @contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """Open the files; each tensor, by name, is read when it is indexed."""
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for file in self.files:
                if is_pickled(file):
                    found |= read_pickled(file)
                    continue
                with reading(file):
                    tensors: Any = stack.enter_context(safe_open(file, framework="pt"))
                    found |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            yield {
                name: found[name]
                if info.part is None
                else PartOfFile(found[info.part.name], info, info.part)
                for name, info in self.tensors.items()
            }


def admit(
    path: str | Path,
    configure: Callable[[dict[str, Any]], Any],
    make: Callable[[Any], nn.Module],
    *,
    renamed: bool = False,
    pickled: bool = False,
    sealed: bool = True,
    kinds: tuple[str, ...] = _FLOATS,
    layout: Callable[[dict[str, Any]], Sequence[Rule]] = lambda _: (),
) -> Admitted:
    """Return the contents of a model directory, or raise one line about its mistake.

    Args:
        path: the directory.
        configure: makes a configuration of the parsed ``config.json``.
        make: makes the model of a configuration; called on the meta device.
        renamed: the model's own names for the tensors of its mixtures differ from those in files,
            as transformers stacks experts: compare the number of elements there.
        pickled: also take PyTorch's own files, read without running what they could contain.
        sealed: compare checksums, which reads all files; else the reader does.
        kinds: floating-point dtypes that are taken.
        layout: given the parsed ``config.json``, says what the files' tensors are in the model.

    Raises:
        InputError: names file or field, and the fix.
    """
    directory = existing(Path(path))
    if (directory / ADAPTERS).is_file():
        raise InputError(
            f"checkpoint: {directory} holds a model and adapters ({ADAPTERS}); merge them, or "
            "remove what is not wanted"
        )
    raw = read_json(directory / CONFIG)
    files = weight_files(directory, pickled)
    found = _pickled_headers(files) if is_pickled(files[0]) else read_headers(files)
    with _unless_damaged(files):
        _check_index(directory, files, found)
        with told(directory / CONFIG):
            check_fields(raw)
            check_heads(SimpleNamespace(**raw))
            _check_layers(raw.get("num_hidden_layers"), found)
            config = configure(_without_steering(raw))
            found = arranged(found, layout(_without_steering(raw)))
            _check_layers(config.num_hidden_layers, found)
            check_heads(config)
            with torch.device("meta"):
                expected = _expected(make(config), found)
        tied = bool(config.tie_word_embeddings)
        _check_kinds(expected, found, kinds)
        _compare(expected, found, {HEAD} if tied or HEAD not in expected else set(), renamed)
    if sealed and not is_pickled(files[0]):
        check_weights(files)
    admitted = Admitted(directory, raw, config, found, read_generation(directory))
    if tied and HEAD in found and EMBEDDINGS in found:
        _check_tied(admitted)
    # A tied head that was saved all the same would come back as a second embedding.
    wanted = {n: i for n, i in found.items() if not (_derived(n) or (tied and n == HEAD))}
    order = [*(name for name in expected if name in wanted), *wanted]
    return replace(admitted, tensors={name: wanted[name] for name in order})


@contextmanager
def _unless_damaged(files: list[Path]) -> Iterator[None]:
    """Where weights do not fit, see first whether a changed byte is why: that names the file."""
    try:
        yield
    except InputError:
        if not is_pickled(files[0]):
            check_weights(files)
        raise


@contextmanager
def told(what: Path | str) -> Iterator[None]:
    """Turn errors that libraries raise for a file's contents into one line.

    Errors that only a mistake in this code can raise pass; the others are the cause of the message,
    and MOEZOO_TRACEBACK shows them.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except InputError as error:
        message = str(error).removeprefix(f"{Path(what).name}: ")
        prefixed = message.startswith(("checkpoint:", str(what)))
        raise InputError(message if prefixed else f"checkpoint: {what}: {message}") from error
    except _BUGS:
        raise
    except Exception as error:
        raise InputError(f"checkpoint: {what}: {_said(error)}") from error


def read_generation(directory: Path) -> GenerationConfig | None:
    """Read ``generation_config.json``; None if there is none.

    Raises:
        InputError: it is no JSON object, or a setting is of a wrong kind or out of range.
    """
    file = directory / GENERATION
    if not os.path.lexists(file):  # a link to nothing is not what was meant by none
        return None
    raw = read_json(file)
    with told(file):
        for name in ("num_beams", "num_return_sequences"):
            if raw.get(name) is not None:
                check_int(name, raw[name], maximum=_MOST_AT_ONCE)
        for name in ("max_length", "max_new_tokens", "max_cache_len"):
            if raw.get(name) is not None:
                check_int(name, raw[name], maximum=LARGEST_SIZE)
        check_fields({n: raw[n] for n in raw if n.endswith("token_id") or n in _FLAGS})
        # transformers writes it, and it comes back as it was.
        derived = {n: v for n, v in raw.items() if n == "_from_model_config" and v is True}
        return GenerationConfig.from_dict(_without_steering(raw) | derived)


def check_model(model: nn.Module, where: Path) -> None:
    """Refuse a model that was loaded with a NaN or an infinity, or sends tokens to nobody.

    Raises:
        InputError: names the tensor.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, HashLayer | L3):
            with told(where / name):
                layer.check_table()
    for name, tensor in model.state_dict(keep_vars=True).items():
        check_finite(name, tensor, where)


def keep_generation(model: Any, admitted: Admitted) -> None:
    """Keep a model's settings of generation so that they are saved as they were read.

    Published ones contradict each other now and then. transformers writes those back that it read
    itself, and refuses all others: after a training, when it is too late.
    """
    if admitted.generation is not None and model.can_generate():
        keep_contradictions(model.generation_config)


def is_pickled(file: Path) -> bool:
    """Return whether a file of weights is one of ``torch.save``."""
    return file.suffix != ".safetensors"


def _without_steering(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what makes transformers load something else, and its private attributes."""
    return {k: v for k, v in raw.items() if k not in STEERING and not k.startswith("_")}


def _said(error: BaseException) -> str:
    """Join the lines of what a library says; its first line is often only a heading."""
    text = " ".join(str(error).split())
    return f"{text[:200]}" if text else type(error).__name__


def _pickled_headers(files: list[Path]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(file, tuple(tensor.shape), KINDS.get(tensor.dtype, str(tensor.dtype)))
        for file in files
        for name, tensor in read_pickled(file).items()
    }


def _check_index(directory: Path, files: list[Path], found: Mapping[str, TensorInfo]) -> None:
    """See that tensors are where the index says."""
    index = directory / INDEX
    if len(files) == 1 or not index.is_file():
        return
    for name, file in indexed(index).items():
        if name not in found or found[name].file != file:
            raise InputError(
                f"checkpoint: {index.name} says that '{name[:80]}' is in {file}, which has no such "
                "tensor; copy or save them again"
            )


def _check_layers(count: Any, found: Mapping[str, TensorInfo]) -> None:
    """Bound the number of layers by those that have tensors, before any of them is built."""
    if not isinstance(count, int):
        return
    numbers = {int(match[1]) for name in found if (match := _LAYER.match(name))}
    if not numbers and count <= len(found):
        return  # names of another architecture, of which its model_type tells more
    missing = next((n for n in range(min(count, len(numbers) + 1)) if n not in numbers), None)
    if missing is not None:
        raise InputError(
            f"num_hidden_layers: {count}, but no tensor of layer {missing} is in the weights; "
            f"weights and {CONFIG} are of different models"
        )


def _expected(model: Any, found: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """List the tensors that a model wants, under the names that a file has."""
    wanted: dict[str, Tensor] = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    inner = not hasattr(model, model.base_model_prefix)  # a model without its head
    if inner and any(name.startswith(prefix) for name in found):
        return {prefix + name: tensor for name, tensor in wanted.items()}
    return wanted


def _derived(name: str) -> bool:
    """Return whether a tensor follows from the configuration, as old Llamas' frequencies do."""
    return name.endswith("rotary_emb.inv_freq")


def _check_kinds(
    expected: Mapping[str, Tensor], found: Mapping[str, TensorInfo], kinds: tuple[str, ...]
) -> None:
    for name, info in found.items():
        tensor = expected.get(name)
        if tensor is not None and not tensor.is_floating_point():
            wanted: tuple[str, ...] = (KINDS.get(tensor.dtype, str(tensor.dtype)),)
        else:
            wanted = kinds
        if info.kind not in wanted:
            raise InputError(
                f"checkpoint: '{name}' in {info.file} is {info.kind}; cast it to "
                f"{'F32' if 'F32' in wanted else wanted[0]}"
            )


def _compare(
    expected: Mapping[str, Tensor],
    found: Mapping[str, TensorInfo],
    optional: set[str],
    renamed: bool,
) -> None:
    """Refuse weights that are not those of the configuration, naming the first difference."""
    shapes = {name: info.shape for name, info in found.items() if not _derived(name)}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if renamed and shapes.keys() - optional != wanted.keys() - optional:
        numbers = [
            sum(torch.Size(shape).numel() for n, shape in each.items() if n not in optional)
            for each in (shapes, wanted)
        ]
        shapes, wanted = ({n: s for n, s in d.items() if not _fused(n)} for d in (shapes, wanted))
    else:
        numbers = [0, 0]
    missing = [name for name in wanted if name not in shapes and name not in optional]
    unexpected = [name for name in shapes if name not in wanted and name not in optional]
    reshaped = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    if reshaped:
        name = reshaped[0]
        problem = f"'{name}' has shape {shapes[name]}, by {CONFIG} {wanted[name]}"
    elif missing:
        problem = f"'{missing[0]}' is missing from the weights"
    elif unexpected:
        problem = f"'{unexpected[0]}' is not a tensor of this model"
    elif numbers[0] != numbers[1]:
        problem = f"the weights have {numbers[0]:,} elements, by {CONFIG} {numbers[1]:,}"
    else:
        return
    more = len(reshaped) + len(missing) + len(unexpected) - 1
    also = f" (and {more} more tensors differ)" if more > 0 else ""
    raise InputError(f"checkpoint: {problem}{also}; weights and {CONFIG} are of different models")


def _fused(name: str) -> bool:
    return any(part in name for part in _FUSED)


def _check_tied(admitted: Admitted) -> None:
    """Refuse a head that differs from the embeddings that it is said to be."""
    with admitted.opened() as tensors:
        one, other = tensors[EMBEDDINGS], tensors[HEAD]
        infos = [admitted.tensors[name] for name in (EMBEDDINGS, HEAD)]
        same = infos[0].shape == infos[1].shape and all(
            torch.equal(one[row : row + _ROWS], other[row : row + _ROWS])
            for row in range(0, infos[0].shape[0], _ROWS)
        )
    if not same:
        raise InputError(
            f"checkpoint: tie_word_embeddings is true in {admitted.directory / CONFIG}, but "
            f"'{HEAD}' differs from '{EMBEDDINGS}'; set it to false, or remove '{HEAD}'"
        )
