"""What is read of a run's folder, and compared with another's."""

import re
from pathlib import Path
from typing import Any

import torch

from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.measure.loggers import read_metrics

REPEATED = ("step", "tokens", "train/loss", "train/grad_norm", "train/lr", "val/loss")
REPEATED += ("train/aux/load_balancing", "experts/entropy/layer_00", "experts/entropy/layer_01")
STATES = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "moezoo")


def callback(name: str, **arguments) -> str:
    """Return the argument that adds a callback to a run."""
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"--trainer.callbacks=[{{class_path: callbacks.{name}, init_args: {{{given}}}}}]"


def rows(run: Path) -> list[list[str | None]]:
    """Read what a resumed run has to repeat of the metrics."""
    return [[row.get(name) for name in REPEATED] for row in read_metrics(run / "metrics.csv")]


def read(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / name)


def assert_equal(left, right, path="") -> None:
    """Compare nested states exactly."""
    if isinstance(left, dict):
        assert isinstance(right, dict), path
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert type(left) is type(right), path
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def assert_same_run(one: Path, two: Path) -> None:
    """Compare all that two finished runs left."""
    assert rows(one) == rows(two)
    for name in ("last.ckpt", "best.ckpt"):
        left, right = read(one, name), read(two, name)
        for key in STATES:
            assert_equal(left[key], right[key], f"{name} {key}")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (one / "model" / name).read_bytes() == (two / "model" / name).read_bytes(), name
    assert names(one) == names(two)


def names(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def moment(folder: Path) -> str:
    """Return what a process that was killed had been writing in a folder, or had written last."""
    found = sorted(folder.rglob("*"))
    started = [path for path in found if re.search(r"\.(tmp|new|old|unfinished)", path.name)]
    files = [path for path in found if path.is_file()]
    if not (started or files):
        return "before anything was written"
    path = started[0] if started else max(files, key=lambda file: file.stat().st_mtime_ns)
    name = re.sub(r"\.(tmp|new|old|unfinished).*|-?\d+", "", path.name).strip(".")
    return f"while {name} was written" if started else f"after {name}"
