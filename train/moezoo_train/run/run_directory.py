"""The directory of a run: its earlier contents, and whether they may be replaced."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import is_there, remove_leftovers
from moezoo_train.adapters.lightning import rank_of_launcher
from moezoo_train.parallel.sharded_checkpoints import REST, is_sharded_checkpoint

_FILES = ("config.yaml", "metrics.csv", "report.json", "loss.png", "sample.txt")
_FOLDERS = ("checkpoints", "model", "adapter", "tensorboard", "wandb")
_LOGS = ("tensorboard", "wandb")
"""Folders that loggers make, and write to, before it is known whether a run can start."""


def is_first() -> bool:
    """Return whether this is the process that writes, before processes have met."""
    return not rank_of_launcher()


def find_checkpoint(output: Path, given: str, command: str, overwrite: bool) -> str | None:
    """Return the path of the checkpoint to begin from; None to start at step 0.

    That is only where ``last`` or ``auto`` is asked for and the directory holds nothing that was
    learned, as after a run that was killed before its first checkpoint; or where it may be
    overwritten, which it never may with ``auto``. That takes ``best`` where there is no ``last``.

    Args:
        output: the run's directory.
        given: ``last``, ``best``, ``auto``, or a path.
        command: fit, validate or test.
        overwrite: whether what is there may be replaced.

    Raises:
        InputError: there is no such checkpoint.
    """
    if given == "auto":
        return _find_any(output, command, overwrite)
    if given not in ("last", "best"):
        _check_path(given)
        return given
    path = output / "checkpoints" / f"{given}.ckpt"
    if is_there(path):
        return str(path)
    found = list(_learned(output))
    if given == "last" and command == "fit" and (overwrite or not found):
        return None
    if not found:
        raise InputError(f"ckpt_path: there is no {path}; name another, or run moezoo fit")
    ways = [_way(output, found, command)]
    if given == "last" and command == "fit":
        ways.append("replace it all with --overwrite true")
    there, fix = ", ".join(found), ", or ".join(ways)
    raise InputError(f"ckpt_path: there is no {path}, but {output} holds {there}; {fix}")


def _find_any(output: Path, command: str, overwrite: bool) -> str | None:
    if command != "fit":
        raise InputError(f"ckpt_path: auto is for moezoo fit; give {command} last, best or a path")
    if overwrite:
        raise InputError(
            "overwrite: ckpt_path auto never overwrites; leave one of the two out, or give last"
        )
    for path in (output / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")):
        if is_there(path):
            return str(path)
    if found := list(_learned(output)):
        raise InputError(
            f"ckpt_path: {output} holds {', '.join(found)} and no checkpoint to go on from; "
            f"{_way(output, found, command)}"
        )
    return None


def _check_path(given: str) -> None:
    path = Path(given)
    if "://" in given or is_sharded_checkpoint(path):
        return
    if path.is_dir():
        raise InputError(
            f"ckpt_path: {path} is a folder without {REST}; name a .ckpt of moezoo fit"
        )
    if not path.exists():
        raise InputError(f"ckpt_path: there is no checkpoint {path}; name another, last or best")


def _learned(output: Path) -> Iterator[str]:
    """Name what a run has left that would have to be trained again."""
    checkpoints = output / "checkpoints"
    names = {path.name for path in checkpoints.glob("*.ckpt")}
    names |= {name for name in ("last.ckpt", "best.ckpt") if is_there(checkpoints / name)}
    yield from (f"checkpoints/{name}" for name in sorted(names) if not name.startswith("."))
    yield from (f"{name}/" for name in ("model", "adapter") if is_there(output / name))
    if (output / "report.json").exists():
        yield "report.json"


def _way(output: Path, found: list[str], command: str) -> str:
    """Name the best way to go on with what there is."""
    if "checkpoints/best.ckpt" in found:
        return "go on with --ckpt_path best" if command == "fit" else "give --ckpt_path best"
    if found[0].endswith(".ckpt"):
        return f"give --ckpt_path {output / found[0]}"
    if "model/" in found and command == "fit":
        return f"begin another run with --model.initialize_from {output / 'model'}"
    return "give another --output"


def find_stale(output: Path, overwrite: bool) -> list[Path]:
    """List what an earlier run left, to be removed once another one really begins.

    Raises:
        InputError: it may not be overwritten.
    """
    there = [output / name for name in (*_FILES, *_FOLDERS) if _holds(output / name)]
    runs = [path.name for path in there if path.name not in _LOGS]
    if runs and not overwrite:
        raise InputError(
            f"output: {output} already holds a run ({', '.join(runs)}); give another --output, "
            "go on with --ckpt_path last, or replace it with --overwrite true"
        )
    if not overwrite:
        return []
    logs = [file for name in _LOGS for file in sorted((output / name).glob("*"))]
    return [path for path in there if path.name not in _LOGS] + logs


def remove(paths: list[Path]) -> None:
    """Remove files and folders, as far as they are there."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_directory(output: Path) -> None:
    """Raise :class:`InputError` if nothing can be written into a directory."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; give a directory")
    for folder in (output, output / "checkpoints"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"output: {folder} cannot be written, permission denied or read-only; give another "
                "directory"
            )


def clean(output: Path) -> None:
    """Remove what killed processes left half written; nobody else may be writing."""
    for name in ("model", "adapter"):
        remove_leftovers(output / name)
    for name in ("last.ckpt", "best.ckpt"):
        remove_leftovers(output / "checkpoints" / name)


def say_anew(output: Path) -> None:
    """Warn that a run which was to go on begins anew: the directory may be a mistake."""
    print(
        f"no checkpoint in {output / 'checkpoints'}: starting at step 0",
        file=sys.stderr,
        flush=True,
    )


def _holds(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
