"""The files of a model directory, found and read without trusting them.

Names are plain, links stay inside, JSON is bounded, and of weights only headers are read. Whether
they fit together is the business of :mod:`moezoo_models.files.gate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.files.checksums import check_seal
from moezoo_models.files.gguf.copies import directory_of

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
ADAPTERS = "adapter_config.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in safetensors files of the dtypes that a model's tensors have."""
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}

_LARGEST_JSON = 1 << 26
_DEEPEST_JSON = 64
_LONGEST_NUMBER = 64
_PIECE = 1 << 20


@dataclass(frozen=True)
class Part:
    """Where in a file's tensor one of ours is.

    Attributes:
        name: of the file's tensor.
        transposed: a matrix is stored as ``(in, out)``.
        first: first of its rows, after that.
        count: number of its rows; None for all.
    """

    name: str
    transposed: bool = False
    first: int = 0
    count: int | None = None

    def of(self, whole: Tensor) -> Tensor:
        """Return the part as a view of the file's tensor."""
        turned = whole.t() if self.transposed and whole.ndim == 2 else whole
        return turned if self.count is None else turned.narrow(0, self.first, self.count)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor, as a file's header describes it.

    Attributes:
        file: where it is.
        shape: its shape.
        kind: its dtype, as safetensors call it.
        part: where it is in a tensor of the file that has another name or layout; None where it
            is that tensor.
    """

    file: Path
    shape: tuple[int, ...]
    kind: str
    part: Part | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype; only of kinds that :data:`DTYPES` knows."""
        return DTYPES[self.kind]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return self.numel * self.dtype.itemsize


def existing(directory: Path) -> Path:
    """Return the directory if it holds a config.json, else raise :class:`InputError`.

    For a GGUF file, that is the directory of its dequantized copy.
    """
    directory = directory_of(directory)
    if "\0" in str(directory):
        raise InputError(f"checkpoint: {str(directory)!r} holds a NUL character, which no path has")
    if not directory.is_dir():
        what = "is a file" if directory.is_file() else "does not exist"
        raise InputError(f"checkpoint: {directory} {what}; give a directory with {CONFIG}")
    if not (directory / CONFIG).is_file():
        if (directory / ADAPTERS).is_file():
            raise InputError(
                f"checkpoint: {directory} holds adapters alone; give the merged model, which "
                "moezoo fit writes to model/ beside them"
            )
        inner = directory / "model"
        hint = f"; did you mean {inner}?" if (inner / CONFIG).is_file() else ""
        raise InputError(f"checkpoint: {directory} holds no {CONFIG}{hint}")
    return directory


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it is missing, a link out of its directory, too large or too deep; it is not
            JSON or not an object; it has a key twice, or a number that is not finite or has more
            than 64 digits.
    """
    check_inside(file)
    try:
        if (size := file.stat().st_size) > _LARGEST_JSON:
            raise InputError(
                f"checkpoint: {file} has {size:,} bytes, more than any configuration; copy it again"
            )
        raw = json.loads(
            file.read_text(encoding="utf-8"),
            object_pairs_hook=_without_repetition,
            parse_constant=_not_finite,
            parse_float=_finite,
            parse_int=_short,
        )
        _check_depth(raw)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"checkpoint: {file} cannot be read: {reason_of(error)}") from error
    except RecursionError as error:
        raise InputError(f"checkpoint: {file} cannot be read: it is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"checkpoint: {file} cannot be read: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"checkpoint: {file} is not a JSON object")
    return raw


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_LONGEST_NUMBER]} is not a finite number")
    return number


def _short(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _check_depth(raw: Any) -> None:
    """Refuse nesting that what copies a configuration could not follow, and broken characters."""
    level, depth = [raw], 0
    while level:
        if depth == _DEEPEST_JSON:
            raise RecursionError
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str):
                each.encode()  # a half of a surrogate pair can be written in JSON, but not printed
        level, depth = inner, depth + 1


def weight_files(directory: Path, pickled: bool = False) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Args:
        directory: the checkpoint.
        pickled: where there are none, list PyTorch's own files, for callers that read them safely.

    Raises:
        InputError: there are none, the index names one that is missing, or one is outside.
    """
    for single in (WEIGHTS, PICKLED) if pickled else (WEIGHTS,):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            check_inside(directory / single)
            return [directory / single]
        if index.is_file():
            return list(dict.fromkeys(indexed(index).values()))
    if pickles := sorted(directory.glob("*.bin")):
        raise InputError(
            f"checkpoint: {pickles[0]} would have to be unpickled, which can run any code; "
            "convert it to safetensors"
        )
    raise InputError(f"checkpoint: {directory} holds neither {WEIGHTS} nor {INDEX}")


def indexed(index: Path) -> dict[str, Path]:
    """Read which tensor is in which file, by an index; the files come in their names' order.

    Raises:
        InputError: it has no such map, a file's name is not plain, or a file is missing or outside.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"checkpoint: {index} has no weight_map; save it again")
    for tensor, name in names.items():
        # A path would lead out of the directory, where nobody looks for a model's files.
        plain = isinstance(name, str) and name == Path(name).name and "\0" not in name
        if not plain or "\\" in name or name in ("", ".", ".."):
            raise InputError(
                f"checkpoint: {index.name} says that '{tensor[:80]}' is in {_shown(name)}, which "
                f"is not the plain name of a file beside it; correct {index}"
            )
    for name in sorted(set(names.values())):
        file = index.with_name(name)
        if not file.is_file():
            raise InputError(f"checkpoint: {file} is missing, but {index.name} names it; copy it")
        check_inside(file)
    return {
        tensor: index.with_name(name)
        for tensor, name in sorted(names.items(), key=lambda item: item[1])
    }


def check_inside(file: Path) -> None:
    """Refuse a link that leads out of the file's directory.

    The cache of the Hugging Face Hub keeps files in ``blobs`` beside ``snapshots``, which hold
    links: those pass.

    Raises:
        InputError: names the file and where it leads.
    """
    if not file.is_symlink():
        return
    try:
        target, home = file.resolve(strict=True), file.parent.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"checkpoint: {file} is a link that leads nowhere; copy it") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in target.parents and target.parent != blobs:
        raise InputError(
            f"checkpoint: {file} is a link out of its directory, to {target}; copy the file"
        )


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Read the headers of safetensors files, in their order.

    Raises:
        InputError: one cannot be read, or two hold the same tensor.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        with reading(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                if name in found:
                    raise InputError(
                        f"checkpoint: '{name}' is in {found[name].file.name} and in {file}; "
                        "remove the file that does not belong there"
                    )
                found[name] = TensorInfo(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def check_weights(files: Iterable[Path]) -> None:
    """See that safetensors files are what was written, where they hold a checksum.

    Raises:
        InputError: one is not.
    """
    for file in files:
        with reading(file):
            check_seal(file)


def check_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    """Refuse a tensor with a NaN or an infinity in it.

    Raises:
        InputError: names it.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return
    pieces = tensor.detach().reshape(-1).split(_PIECE) if tensor.numel() else ()
    for piece in pieces:
        low, high = piece.aminmax()  # one pass and no mask: NaN and infinity are the extremes
        if not (low.isfinite() and high.isfinite()):
            raise InputError(
                f"checkpoint: '{name}' in {where} holds NaN or infinity; the weights are damaged"
            )


def read_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a checkpoint of any architecture, and nothing else of it.

    Raises:
        InputError: no checkpoint there, a damaged one, or one without that tensor; or the tensor
            is not of finite floating-point numbers.
    """
    directory = existing(Path(path))
    found = read_headers(weight_files(directory)).get(name)
    if found is None:
        raise InputError(f"checkpoint: {directory} has no tensor '{name}'; give another one")
    if found.kind not in DTYPES or not found.dtype.is_floating_point:
        raise InputError(f"checkpoint: '{name}' in {found.file} is {found.kind}; cast it to F32")
    check_weights([found.file])
    with reading(found.file), safe_open(found.file, framework="pt") as tensors:
        tensor = cast(Tensor, tensors.get_tensor(name))
    check_finite(name, tensor, directory)
    return tensor


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn errors of reading a file of weights into one line.

    Raises:
        InputError: for what safetensors, the checksum or the system raise.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        # safetensors raise it, without a number, for some damage, too.
        message = damaged(file, error) if error.errno is None else unreadable(file, error)
        raise InputError(message) from error
    except (SafetensorError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(damaged(file, error)) from error


def damaged(file: Path, error: BaseException) -> str:
    """Return the line that says that a file of weights is damaged."""
    return f"checkpoint: {file} is truncated or damaged ({one_line(error)}); copy or save it again"


def unreadable(file: Path, error: OSError) -> str:
    """Return the line that says that the system does not let a file be read."""
    return f"checkpoint: {file} cannot be read: {reason_of(error)}"


def reason_of(error: OSError) -> str:
    """Return the system's reason of an error."""
    return (error.strerror or one_line(error)).lower()


def one_line(error: BaseException) -> str:
    """Return the beginning of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
