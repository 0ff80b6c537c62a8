"""Sharded checkpoints: a directory of safetensors files, of which every process writes its own.

Beside the shards, ``rest.ckpt`` holds everything else, and of each sharded tensor its name, shape
and dtype. Torch's own format of distributed checkpoints keeps an index that has to be unpickled;
this one is torch's Hugging Face format, whose index is the files' headers. Any number of processes
can read a checkpoint of any other. The rest also holds the checksums of the shards.
"""

from __future__ import annotations

import pickle
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import publish
from moezoo_models.checkpoints.directory import one_line
from moezoo_models.files.checksums import check_archive, crc_of_file
from moezoo_train.checkpoint_structure import check_structure
from moezoo_train.parallel.distributed import gather_from_ranks, process_count
from moezoo_train.parallel.state_dicts import like_shards, parameters_of, place_of

REST = "rest.ckpt"
TIED = "moezoo.tied"
"""Field of the rest: names of tensors that are others, under whose names they were written."""
SUMS = "moezoo.checksums"
"""Field of the rest: the checksums of the other files, by name."""


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Return whether a path is the directory of a sharded checkpoint."""
    return (Path(path) / REST).is_file()


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; all processes must call this together.

    The directory takes its name when it is complete: an interruption leaves the earlier one.

    Args:
        checkpoint: as Lightning makes it; its tensors may be sharded.
        path: directory to make or replace, on a file system that all processes share.
    """
    first = dist.get_rank() == 0
    names = [f".{path.name}.new-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(names)  # pickled, but only between the processes of one run
    fresh = path.with_name(names[0])
    rest, parts = _take_out(checkpoint)
    with _quiet():
        writer = dcp.HuggingFaceStorageWriter(str(fresh), save_distributed=True)
        dcp.save(parts, storage_writer=writer)
    rest[SUMS] = _sums(fresh, together=True)
    if first:
        torch.save(rest, fresh / REST)
        publish(fresh, path)
    dist.barrier()


def load_sharded(
    path: Path,
    model: Mapping[str, Any] | None = None,
    optimizers: list[Optimizer] | None = None,
    model_only: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the directory.
        model: a state dict; tensors are read into shards like its own. All processes must then
            call this together.
        optimizers: the same for their parameters.
        model_only: leave the optimizers' states out.

    Returns:
        The checkpoint. A tensor whose shape is not the model's is on the meta device.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        _check_rest(path / REST)
        rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
        check_structure(rest)
        for field in (SUMS, TIED):
            if not isinstance(rest.get(field, {}), dict):
                raise ValueError(f"{field} is not a mapping")
        if model_only:
            rest.pop("optimizer_states", None)
        _check_sums(rest.pop(SUMS, {}), _sums(path, together=model is not None))
        wanted: dict[str, Tensor] = {}
        like = _by_name(model or {}, optimizers or [])
        tied = rest.pop(TIED)
        for name, owner, holder, key in checkpoint_tensors(rest):
            if not holder[key].is_meta:
                continue
            name = tied.get(name, name)
            if name not in wanted:
                room = _room(holder[key], like.get(owner))
                if room.is_meta:
                    continue
                wanted[name] = room
            holder[key] = wanted[name]
        with _quiet():
            reader = dcp.HuggingFaceStorageReader(str(path))
            _check_complete(wanted, reader.read_metadata().state_dict_metadata)
            dcp.load(wanted, storage_reader=reader, no_dist=model is None)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        SafetensorError,
        dcp.CheckpointException,
    ) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            reason = (error.strerror or one_line(error)).lower()
            place = error.filename or path
            raise InputError(f"ckpt_path: {place} cannot be read: {reason}") from error
        raise InputError(
            f"ckpt_path: {path} is damaged or incomplete ({one_line(error)}); use another, e.g. "
            "best.ckpt beside it"
        ) from error
    return rest


def _check_rest(file: Path) -> None:
    try:
        check_archive(file)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _sums(path: Path, together: bool) -> dict[str, int]:
    """Return the checksum of each shard; ``together``, each process reads some of them."""
    step = process_count() if together else 1
    files = sorted(path.glob("*.safetensors"))
    own = {
        file.name: crc_of_file(file) for file in files[dist.get_rank() if step > 1 else 0 :: step]
    }
    shares = gather_from_ranks(own) if together else [own]
    return {name: value for share in shares for name, value in share.items()}


def _check_sums(written: Mapping[str, int], found: Mapping[str, int]) -> None:
    for name, value in written.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != value:
            raise ValueError(f"the checksum of {name} is wrong")


def _check_complete(wanted: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """See that every number of every tensor is there: torch would leave a gap as it is."""
    for name, tensor in wanted.items():
        chunks = found[name].chunks if name in found else []
        if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise ValueError(f"a part of {name} is missing")


def _take_out(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Separate the sharded tensors, and leave their shapes in their places."""
    rest = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    rest["optimizer_states"] = [
        {**state, "state": {n: dict(values) for n, values in state["state"].items()}}
        for state in checkpoint.get("optimizer_states", [])
    ]
    parts: dict[str, Tensor] = {}
    first: dict[tuple[int, int], str] = {}
    rest[TIED] = {}
    for name, _, holder, key in checkpoint_tensors(rest):
        tensor = holder[key]
        if isinstance(tensor, DTensor):
            holder[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            place = place_of(tensor)
            if place in first:
                rest[TIED][name] = first[place]
            else:
                first[place] = name
                parts[name] = tensor.detach()
    return rest, parts


def checkpoint_tensors(
    checkpoint: Mapping[str, Any],
) -> Iterator[tuple[str, str, dict[Any, Any], Any]]:
    """Go through the tensors of model and optimizers: name, owner, holder and key.

    The owner is the parameter's name; in an optimizer's state, its number.
    """
    for name in list(checkpoint["state_dict"]):
        yield f"model.{name}", f"model.{name}", checkpoint["state_dict"], name
    for index, state in enumerate(checkpoint.get("optimizer_states", [])):
        for number, values in state["state"].items():
            for key in [key for key, value in values.items() if isinstance(value, Tensor)]:
                owner = f"optimizer.{index}.{number}"
                yield f"{owner}.{key}", owner, values, key


def _by_name(model: Mapping[str, Any], optimizers: list[Optimizer]) -> dict[str, Any]:
    """Return the tensors that those of a checkpoint will be like, by owner."""
    found = {f"model.{name}": tensor for name, tensor in model.items()}
    for index, optimizer in enumerate(optimizers):
        parameters = enumerate(parameters_of(optimizer))
        found |= {f"optimizer.{index}.{number}": like_shards(p) for number, p in parameters}
    return found


def _room(stored: Tensor, like: Any) -> Tensor:
    """Make room for a stored tensor, unless it is of another shape than it should be."""
    if like is None:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if stored.shape != like.shape:
        return stored
    return torch.empty_like(like, dtype=stored.dtype).detach()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about its own functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
