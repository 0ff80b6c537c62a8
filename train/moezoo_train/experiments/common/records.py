"""The runs of an experiment on disk: a finished one is recognised by its hash and not repeated."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moezoo
from moezoo.errors import going_on
from moezoo_models.checkpoints.locks import writing
from moezoo_train.measure.writing import write_json

Figures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One run of an experiment.

    Attributes:
        name: of the run's folder.
        inputs: all that its figures depend on, JSON-able, versions aside.
        measure: makes the run in a folder that is empty, and gives the figures.
    """

    name: str
    inputs: Mapping[str, Any]
    measure: Callable[[Path], Figures]

    @property
    def identity(self) -> dict[str, Any]:
        """Inputs and versions that the figures depend on."""
        versions = {"moezoo": moezoo.__version__, "torch": torch.__version__}
        return json.loads(json.dumps({**versions, **self.inputs}, default=str))


def run_all(folder: Path, tasks: list[Task], said: str, console: Console) -> dict[str, Figures]:
    """Make the runs that are not finished, with a line for each; return all figures by name.

    Args:
        folder: gets a folder for each run, with ``result.json``.
        tasks: in the order in which they are made.
        said: the figure to report while running.
        console: where to.
    """
    with writing(folder), going_on("the same command keeps the runs that are finished"):
        return _run_all(folder, tasks, said, console)


def _run_all(folder: Path, tasks: list[Task], said: str, console: Console) -> dict[str, Figures]:
    found = {task.name: figures for task in tasks if (figures := _finished(folder, task))}
    console.print(f"{len(tasks)} runs, {len(found)} of them finished before", highlight=False)
    for number, task in enumerate(tasks, 1):
        if task.name in found:
            continue
        place = folder / task.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        found[task.name] = figures = task.measure(place)
        write_record(place / RESULT, task.identity, figures=figures)
        line = f"[{number}/{len(tasks)}] {task.name}: {said} {figures[said]:.4f}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {task.name: found[task.name] for task in tasks}


def _finished(folder: Path, task: Task) -> Figures | None:
    """Return the figures of a run that was made with the same inputs."""
    record = read_record(folder / task.name / RESULT, task.identity) or {}
    return record.get("figures")


RESULT = "result.json"


def read_record(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of a run with the same identity; None if there is no such record.

    Only the hash is compared, so records without the identity in words count as well.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # never run, or damaged
    same = isinstance(record, dict) and record.get("hash") == fingerprint(identity)
    return record if same else None


def write_record(path: Path, identity: Mapping[str, Any], **content: Any) -> None:
    """Write a finished run as JSON: the hash of its identity, the identity, and its content."""
    write_json(path, {"hash": fingerprint(identity), "identity": identity, **content})


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash an identity: equal hashes mean equal runs."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
