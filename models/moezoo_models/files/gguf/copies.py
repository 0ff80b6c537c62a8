"""A GGUF file as a model directory: dequantized once, kept in the user's cache, read from there.

A copy is named after what is in the file and what converted it, appears under its name when it is
complete, and can be removed at any time. Everything else reads it as any other directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moezoo.atomic import NO_ROOM
from moezoo.cache_folder import cache_folder
from moezoo.command.messages import size
from moezoo.errors import InputError
from moezoo_models.files.checksums import seal
from moezoo_models.files.gguf.header import Header, is_gguf, read_header
from moezoo_models.files.gguf.reading import GGUFModel, read_model
from moezoo_models.files.gguf.words import write_tokenizer
from moezoo_models.files.hub import fetched, is_hub_name

FORMAT = 1
"""Of a copy; one of another number is not read."""
RECORD = "moezoo_gguf.json"
"""In a copy: which file it is of, and the sizes of its files."""

_PACKAGES = ("transformers", "tokenizers", "gguf")
_SHARD = 1 << 30
_ROOM = 1 << 26  # beside the weights: tokenizer and headers
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def directory_of(path: Path) -> Path:
    """Return the model directory that a path stands for.

    That is the path itself, unless it names a model on the Hub, which is fetched into its cache; or
    it is a GGUF file, or a directory with one such file and no safetensors: then a copy of it, made
    now if there is none.

    Raises:
        InputError: the file is none, is damaged, or holds a model that is not read; a directory
            has several; there is no room for a copy; or the Hub has no such model to fetch.
    """
    if is_hub_name(path):
        return fetched(path)
    file = gguf_of(path)
    if file is None:
        return path
    try:
        state = file.stat()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"checkpoint: {file} cannot be read: {reason}") from error
    return _copy_of(file.resolve(), str(file), state.st_size, state.st_mtime_ns, cache_folder())


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for; None if it stands for none.

    Raises:
        InputError: a directory holds several, and no other weights.
    """
    if "\0" in str(path):
        return None
    if not path.is_dir():
        return path if is_gguf(path) else None
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(
            f"checkpoint: {path} holds {len(files)} GGUF files; name one, e.g. {files[0]}"
        )
    return files[0] if files else None


@lru_cache(maxsize=16)
def _copy_of(file: Path, shown: str, length: int, changed: int, cache: Path) -> Path:
    """Find or make the copy of a file; size and time of change tell a changed one."""
    header = read_header(file)
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    identity = json.dumps([FORMAT, content, versions], sort_keys=True)
    place = cache / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    said = header.describe()
    with _alone(place):
        if _complete(place):
            print(f"{shown}: {said}; from {place}", file=sys.stderr, flush=True)
            return place
        _make(place, header, {"file": str(file), "sha256": content, **versions})
    used = sum(each.stat().st_size for each in place.iterdir())
    print(
        f"{shown}: {said}; {size(used)} in {place}, which can be removed",
        file=sys.stderr,
        flush=True,
    )
    return place


def _complete(place: Path) -> bool:
    """Return whether a copy is there with all of its files."""
    try:
        sizes = json.loads((place / RECORD).read_text(encoding="utf-8"))["bytes"]
        return all((place / name).stat().st_size == count for name, count in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(place: Path, header: Header, record: dict[str, Any]) -> None:
    model = read_model(header)
    needed = header.numel * model.dtype.itemsize
    needed += min(needed, _SHARD) + _ROOM  # a file is copied once when it gets its checksum
    if needed > (free := shutil.disk_usage(place.parent).free):
        raise InputError(
            f"checkpoint: {header.file} dequantized needs {size(needed)}, and {place.parent} has "
            f"{size(free)} free; free space, or set MOEZOO_CACHE to a folder on another disk"
        )
    fresh = place.with_name(f".{place.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        fresh.mkdir()
        model.config.dtype = model.dtype
        model.config.save_pretrained(fresh)
        if (missing := write_tokenizer(header, fresh)) is not None:
            print(
                f"moezoo: warning: {missing}; set --tokenizer, or copy the original's "
                f"tokenizer.json to {place}",
                file=sys.stderr,
                flush=True,
            )
        _write_weights(model, fresh)
        sizes = {each.name: each.stat().st_size for each in sorted(fresh.iterdir())}
        kinds = {name: tensor.kind for name, tensor in header.tensors.items()}
        text = json.dumps({**record, "bytes": sizes, "kinds": kinds}, indent=2)
        (fresh / RECORD).write_text(text, encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # incomplete, or it would have been taken
        fresh.rename(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:120]
        full = getattr(error, "errno", None) in NO_ROOM or isinstance(error, SafetensorError)
        fix = "free space, or " if full else ""
        raise InputError(
            f"checkpoint: the copy of {header.file} cannot be written to {place.parent} "
            f"({reason.lower()}); {fix}set MOEZOO_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # published, it is gone


def _write_weights(model: GGUFModel, folder: Path) -> None:
    """Write the tensors to safetensors files of about a gigabyte, sealed; one is in memory."""
    shards: list[tuple[Path, list[str]]] = []
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        file = folder / f"{len(shards)}.safetensors"
        save_file(waiting, file, metadata={"format": "pt"})
        seal(file)
        shards.append((file, list(waiting)))
        waiting.clear()

    for name, tensor in model.tensors():
        waiting[name] = tensor.to(model.dtype).contiguous()
        if sum(each.nbytes for each in waiting.values()) >= _SHARD:
            write()
    if waiting:
        write()
    if len(shards) == 1:
        shards[0][0].rename(folder / _WEIGHTS)
        return
    where: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.rename(folder / final)
        where |= dict.fromkeys(names, final)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other processes from making the same copy, and remove what killed ones left."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that makes {place}", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"checkpoint: the dequantized copy cannot be written to {place.parent} "
            f"({reason.lower()}); set MOEZOO_CACHE to a folder that can be written"
        ) from error
    try:
        for left in place.parent.glob(f".{place.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        # First: whoever takes the lock of a file without a name begins again with a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
