"""Writing a checkpoint that does not fit into memory: streamed, atomic, resumable.

Sizes are known before the first byte, so shards get their final names at once. Each is written
under a temporary name, piece by piece, and renamed; a manifest beside them says which are done. The
directory itself is a hidden one until everything is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.atomic import named_errors
from moezoo.command.messages import size
from moezoo.errors import InputError, going_on
from moezoo_models.checkpoints.atomic import publish, remove_leftovers
from moezoo_models.checkpoints.directory import CONFIG, INDEX, WEIGHTS
from moezoo_models.checkpoints.finite import check_finite
from moezoo_models.checkpoints.locks import writing
from moezoo_models.conversion.source import layer_of
from moezoo_models.conversion.targets import Output
from moezoo_models.files.checksums import check_seal, sealed_header, sum_of_header

MANIFEST = "manifest.json"
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 1 << 22
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        name: of the file.
        outputs: its tensors, in the order they are written.
    """

    name: str
    outputs: tuple[Output, ...]

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(output.bytes for output in self.outputs)


def parse_size(text: str) -> int:
    """Read a size such as ``5GB`` or ``200MB``.

    Raises:
        InputError: it is none.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise InputError(f"max_shard_size: '{text}' is no size; write e.g. 5GB or 200MB")
    return size


def plan_shards(outputs: Iterable[Output], max_bytes: int) -> list[Shard]:
    """Distribute tensors over files; the tensors of a block stay together where they fit."""
    groups: list[list[Output]] = [[]]
    sizes = [0]
    for block in _blocks(outputs):
        size = sum(output.bytes for output in block)
        pieces = [block] if size <= max_bytes else [[output] for output in block]
        for piece in pieces:
            size = sum(output.bytes for output in piece)
            if groups[-1] and sizes[-1] + size > max_bytes:
                groups.append([])
                sizes.append(0)
            groups[-1] += piece
            sizes[-1] += size
    total = len(groups)
    names = [WEIGHTS] if total == 1 else [_shard_name(i, total) for i in range(total)]
    # Wide dtypes first, so that every tensor begins at a multiple of its element's size.
    return [
        Shard(name, tuple(sorted(group, key=lambda output: -output.dtype.itemsize)))
        for name, group in zip(names, groups, strict=True)
    ]


def _blocks(outputs: Iterable[Output]) -> Iterator[list[Output]]:
    block: list[Output] = []
    for output in outputs:
        if block and layer_of(output.name) != layer_of(block[0].name):
            yield block
            block = []
        block.append(output)
    yield block


def _shard_name(number: int, total: int) -> str:
    stem, _, ending = WEIGHTS.rpartition(".")
    return f"{stem}-{number + 1:05d}-of-{total:05d}.{ending}"


@dataclass
class Workspace:
    """The hidden directory in which a checkpoint is made.

    Attributes:
        directory: where it is.
        identity: what is made there; a manifest with another one is not continued.
        done: SHA-256 of the files that are complete, by name.
    """

    directory: Path
    identity: str
    done: dict[str, str]

    def write(self, shard: Shard, progress: Callable[[int], None]) -> None:
        """Write one file, unless an earlier run did.

        Args:
            shard: which.
            progress: told the number of bytes after each piece.
        """
        path = self.directory / shard.name
        if shard.name in self.done and _sound(path):
            progress(shard.bytes)
            return
        temporary = path.with_name(f".{path.name}.new")
        self.done[shard.name] = write_safetensors(temporary, shard.outputs, progress)
        temporary.rename(path)
        self.save()

    def write_index(self, shards: Sequence[Shard]) -> None:
        """Write which tensor is in which file, if there are several."""
        if len(shards) == 1:
            return
        files = {output.name: shard.name for shard in shards for output in shard.outputs}
        total = sum(shard.bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        self.write_json(INDEX, index)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        with named_errors(self.directory / name):
            (self.directory / name).write_text(text, encoding="utf-8")

    def save(self) -> None:
        """Write the manifest, by which a later run knows this directory."""
        manifest = {"identity": self.identity, "done": self.done}
        temporary = self.directory / f".{MANIFEST}.new"
        with named_errors(temporary):
            temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        temporary.rename(self.directory / MANIFEST)


@contextmanager
def workspace(target: Path, identity: str, force: bool) -> Iterator[Workspace]:
    """Yield a directory to fill, which becomes ``target`` at the end.

    A run that was killed or interrupted left its directory behind: the same conversion goes on
    there, another one starts anew. After an error nothing is left.

    Args:
        target: the checkpoint to make.
        identity: hash of all that decides its contents.
        force: replace a checkpoint that is there.

    Raises:
        InputError: ``target`` is a file, or a directory with something in it; or another process
            is writing it.
    """
    with writing(target, "target"), going_on("the same command goes on where this one was"):
        check_target(target, force)
        remove_leftovers(target)
        directory = _partial(target)
        done = _resumable(directory, identity)
        if done is None:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        work = Workspace(directory, identity, done or {})
        work.save()
        try:
            yield work
            (directory / MANIFEST).unlink(missing_ok=True)
            publish(directory, target)
        except Exception:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def check_target(target: Path, force: bool) -> None:
    """Raise :class:`InputError` if a checkpoint cannot be made there."""
    if target.exists() and not target.is_dir():
        raise InputError(f"target: {target} is a file; name a new directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise InputError(f"target: {target} is not empty; name a new directory, or add --force")
    if not (target / CONFIG).is_file():
        raise InputError(f"target: {target} holds something that is no checkpoint; name another")


def check_space(target: Path, needed: int) -> None:
    """Raise :class:`InputError` if the disk does not have that many bytes left.

    What a killed run left there counts as free: it is continued, or else removed.
    """
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    left = (file for file in _partial(target).rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in left)
    if needed > free:
        raise InputError(
            f"target: {target} needs {size(needed)}, and {folder} has "
            f"{size(free)} free; make room or name a directory elsewhere"
        )


def _partial(target: Path) -> Path:
    """Return the hidden directory in which a checkpoint is made."""
    return target.with_name(f".{target.name}.partial")


def _sound(path: Path) -> bool:
    """Return whether an earlier run's file is there, and is what was written."""
    try:
        check_seal(path)
    except (OSError, ValueError):
        return False
    return True


def _resumable(directory: Path, identity: str) -> dict[str, str] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest["done"]) if manifest["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_safetensors(
    path: Path, outputs: Sequence[Output], progress: Callable[[int], None] = lambda _: None
) -> str:
    """Write a safetensors file tensor by tensor, its checksum in its header, and hash it.

    The library's own writer wants all tensors of a file at once.

    Args:
        path: the file.
        outputs: its tensors, wide dtypes first.
        progress: told the number of bytes after each piece.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: a tensor is not finite.
    """
    called = Path(path.name.removeprefix(".").removesuffix(".new"))
    header = _header(outputs)
    total = sum_of_header(header)
    with named_errors(path), path.open("wb") as file:
        file.write(sealed_header(header, total))
        for output in outputs:
            written = 0
            for piece in output.pieces():
                assert piece.dtype == output.dtype, output.name
                check_finite([(output.name, piece)], called)
                for part in _bytes(piece):
                    total = zlib.crc32(part, total)
                    file.write(part)
                    written += len(part)
                    progress(len(part))
            assert written == output.bytes, output.name
        file.seek(0)
        file.write(sealed_header(header, total))
        file.flush()
        with ThreadPoolExecutor(1) as pool:  # the disk has time meanwhile
            flushed = pool.submit(os.fsync, file.fileno())
            digest = _read_again(path, called, len(sealed_header(header, total)), total, header)
            flushed.result()
    return digest


def _read_again(path: Path, called: Path, start: int, total: int, header: dict[str, Any]) -> str:
    """Hash a file, and see that it holds what was written.

    Args:
        path: the file.
        called: its name, for the message.
        start: where its tensors begin.
        total: its checksum.
        header: what it says of its tensors.

    Returns:
        Its SHA-256.

    Raises:
        InputError: it does not.
    """
    digest, found = hashlib.sha256(), sum_of_header(header)
    part = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(start))
        while size := file.readinto(part):
            digest.update(part[:size])
            found = zlib.crc32(part[:size], found)
    if found != total:
        raise InputError(
            f"target: {called} does not hold what was written to it; look after the disk and the "
            "memory, or name a directory elsewhere"
        )
    return digest.hexdigest()


def _header(outputs: Sequence[Output]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in outputs:
        end = start + output.bytes
        header[output.name] = {
            "dtype": _KINDS[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [start, end],
        }
        start = end
    return header


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces, so that a mapped one is never in memory as a whole."""
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(_PIECE_BYTES):
        yield memoryview(part.numpy())
