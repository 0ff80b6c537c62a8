"""``trainer.precision``: what ``auto`` stands for, and what a chosen one costs on this CPU.

Several parts of a run read the precision before there is a trainer, and its ``config.yaml`` is to
hold the one that it computes in, so ``auto`` is replaced before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

from moezoo import dtype_speed
from moezoo_train.run.beforehand import read_description

AUTO = "auto"
_Precision = Literal[
    "transformer-engine",
    "transformer-engine-float16",
    "16-true",
    "16-mixed",
    "bf16-true",
    "bf16-mixed",
    "32-true",
    "64-true",
    64,
    32,
    16,
    "64",
    "32",
    "16",
    "bf16",
    "auto",
]


class RunTrainer(Trainer):
    """Lightning's trainer, whose precision a configuration may leave open.

    Args:
        args: of the trainer.
        precision: of parameters and products; auto is bf16-mixed on GPUs that have it, else
            32-true, and has to be replaced before.
        kwargs: of the trainer.
    """

    def __init__(self, *args: Any, precision: _Precision | None = None, **kwargs: Any) -> None:
        assert precision != AUTO, "replaced by resolve"
        super().__init__(*args, precision=cast(Any, precision), **kwargs)


def precision_here(precision: str) -> str:
    """Return what a precision stands for on the device that comparisons train on."""
    if precision != AUTO:
        return precision
    return dtype_speed.training_precision("cuda" if torch.cuda.is_available() else "cpu")


def resolve(trainer: Mapping[str, Any], checkpoint: str | None) -> tuple[Any, str | None]:
    """Return the precision of a run, and a line to say about it, if any.

    Args:
        trainer: the trainer's options.
        checkpoint: what the run goes on from; it keeps its precision, so that its losses and what
            follows from them are those of one run.
    """
    given, device = trainer.get("precision"), _device(trainer.get("accelerator"))
    if given != AUTO:
        cost = dtype_speed.cost_of_training(_long_name(given), device)
        return given, cost and f"trainer.precision: {cost}"
    if checkpoint is not None and (began := began_with(checkpoint)) is not None:
        return began, f"trainer.precision: auto is {began}, in which the run began"
    chosen = dtype_speed.training_precision(device)
    return chosen, f"trainer.precision: auto is {chosen} here"


def began_with(checkpoint: str) -> str | None:
    """Return the precision of the run that wrote a checkpoint, or None if nothing says it.

    Checkpoints of before there was a choice do not; the ``config.yaml`` beside them does.
    """
    remote = "://" in checkpoint
    if not remote and not Path(checkpoint).exists():
        return None
    saved = (read_description(checkpoint if remote else Path(checkpoint)) or {}).get("precision")
    if isinstance(saved, str):
        return saved
    try:
        config = yaml.safe_load(_read_configuration(checkpoint, remote))
        written = config["trainer"]["precision"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError):
        return None
    return None if written == AUTO else _long_name(written)


def _read_configuration(checkpoint: str, remote: bool) -> str:
    """Read the run's ``config.yaml``, beside the folder of its checkpoints."""
    if not remote:
        return (Path(checkpoint).parents[1] / "config.yaml").read_text(encoding="utf-8")
    url = f"{checkpoint.rsplit('/', 2)[0]}/config.yaml"
    with get_filesystem(url).open(url, "rb") as file:
        return bytes(file.read()).decode()


def _device(accelerator: Any) -> str:
    """Name the kind of device that an accelerator's name stands for."""
    if accelerator in ("cpu", "tpu"):
        return str(accelerator)
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _long_name(precision: Any) -> str:
    short = {"None": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
    return {**short, "64": "64-true"}.get(str(precision), str(precision))
