"""Training checkpoints on disk: written whole or not at all, read without unpickling."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import atomic_write, is_there, publish
from moezoo_models.checkpoints.directory import one_line
from moezoo_models.files.checksums import check_archive
from moezoo_train.checkpoint_structure import check_structure
from moezoo_train.parallel.sharded_checkpoints import is_sharded_checkpoint, load_sharded

_REQUIRED = {"state_dict", "pytorch-lightning_version"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, made safe.

    Lightning writes to the system's temporary folder and moves from there, which is a copy, not a
    rename, where that is another disk. This writes beside the target. Reading never unpickles,
    whatever the trainer says, compares checksums, and what cannot be read is one clear line.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; remote paths (``s3://…``) are left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        if not is_sharded_checkpoint(target):
            _write(checkpoint, target)
            return
        # A directory, of a run whose processes wrote one each, goes when the file is complete.
        complete = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
        try:
            _write(checkpoint, complete)
            publish(complete, target)
        finally:
            complete.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            InputError: there is none, it is damaged, or it is not a Lightning checkpoint.
        """
        if is_sharded_checkpoint(path):
            return load_sharded(Path(path))
        try:
            if "://" not in str(path):
                check_archive(path)
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            if isinstance(checkpoint, dict) and checkpoint.keys() >= _REQUIRED:
                check_structure(checkpoint)
        except FileNotFoundError:
            raise InputError(f"ckpt_path: there is no checkpoint {path}; name another") from None
        except IsADirectoryError:
            raise InputError(f"ckpt_path: {path} is a folder; name a .ckpt file in it") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise InputError(
                f"ckpt_path: {path} is damaged or not a checkpoint ({one_line(error)}); "
                "use another, e.g. best.ckpt beside it"
            ) from error
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _REQUIRED:
            raise InputError(
                f"ckpt_path: {path} is not a training checkpoint; give one of moezoo fit, or the "
                "directory of a model as model.initialize_from"
            )
        return checkpoint


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """The same files, written by a thread from a copy in main memory, while training goes on.

    One at a time: the next checkpoint, reading, and the end of the run wait for the last one, and
    raise what went wrong with it. (Lightning's own plugin copies tensors only, while other state
    changes under the thread's hands, and replaces the plugin that is to write by its default.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Copy a checkpoint, and let it be written.

        The first of its name is waited for: whatever is written next, there is one to go on from.
        """
        self._wait()
        first = "://" not in str(path) and not is_there(Path(path))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        state = _copy(checkpoint, {})
        self._pending = self._pool.submit(super().save_checkpoint, state, path, storage_options)
        if first:
            self._wait()

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; see :class:`AtomicCheckpointIO`."""
        self._wait()
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self._wait()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """See that everything is written."""
        try:
            self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copy(value: Any, seen: dict[Any, Tensor]) -> Any:
    """Copy a checkpoint to main memory; tensors that are one, as tied weights are, stay one."""
    if isinstance(value, Tensor):
        place = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if place not in seen:
            seen[place] = value.detach().to("cpu", copy=True)
        return seen[place]
    if isinstance(value, dict):
        return {key: _copy(inner, seen) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(inner, seen) for inner in value)
    return copy.deepcopy(value)


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    try:
        with atomic_write(target) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        # Torch's writer of archives stumbles over its own end when the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
