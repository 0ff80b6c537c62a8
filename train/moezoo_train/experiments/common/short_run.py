"""Short training runs of experiments, without a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch.utils.hooks import RemovableHandle

from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.data.prepare import prepare
from moezoo_train.experiments.common.options import TextOptions
from moezoo_train.measure.expert_load import ExpertLoad, LoadCounter
from moezoo_train.measure.loggers import MetricsCSV, read_metrics
from moezoo_train.measure.progress import StepProgress
from moezoo_train.measure.report import Report, collect
from moezoo_train.run.cli import TRAINER_DEFAULTS
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.stopping import raising_interrupts


class ValidationLoad(pl.Callback):
    """Count the load of experts and slots in validation, without random choices or soft decisions.

    Attributes:
        loads: of the layers that count, at the last validation.
    """

    def __init__(self) -> None:
        self.loads: list[ExpertLoad] = []
        self._counter = LoadCounter()
        self._hook: RemovableHandle | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the model."""
        self._hook = pl_module.register_forward_hook(
            lambda module, arguments, output: self._counter.add(
                [*output.ffn_stats, *(output.memory_stats or ())]
            )
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up."""
        if self._hook is not None:
            self._hook.remove()
        self.loads = self._counter.take()


def open_text(text: TextOptions, seed: int) -> TokenDataModule:
    """Return the prepared text in the order of a seed."""
    return TokenDataModule(
        source=None,
        data_dir=text.data_dir,
        sequence_length=text.sequence_length,
        batch_size=text.batch_size,
        seed=seed,
    )


def fit(
    module: LanguageModel,
    text: TokenDataModule,
    folder: Path,
    max_steps: int,
    precision: str,
    console: Console,
) -> tuple[Report, list[ExpertLoad]]:
    """Train a model, validating at the end; return report and validation load.

    Args:
        module: the model to train.
        text: training and validation data.
        folder: gets ``metrics.csv``.
        max_steps: optimizer steps.
        precision: as the trainer's.
        console: shows progress, if it is a terminal.
    """
    load = ValidationLoad()
    options: dict[str, Any] = TRAINER_DEFAULTS | {
        "max_steps": max_steps,
        "val_check_interval": max_steps,
        "log_every_n_steps": min(10, max_steps),
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "precision": precision,
        "logger": [MetricsCSV(folder / "metrics.csv")],
        "callbacks": [load, *([StepProgress(console)] if console.is_terminal else [])],
        "enable_progress_bar": console.is_terminal,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(**options)
    with raising_interrupts():
        trainer.fit(module, datamodule=text)
    return collect(trainer, module, read_metrics(folder / "metrics.csv")), load.loads


def validate(
    module: LanguageModel, text: TextOptions, precision: str
) -> tuple[float, list[ExpertLoad]]:
    """Return validation loss in nats per token, and load; the model stays as it is."""
    load = ValidationLoad()
    trainer = pl.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        callbacks=[load],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with raising_interrupts():
        (metrics,) = trainer.validate(module, datamodule=open_text(text, 0), verbose=False)
    module.train()
    return float(metrics["val/loss"]), load.loads


def prepare_text(text: TextOptions) -> dict[str, Any]:
    """Prepare the tokens of a comparison's text, and return what identifies them."""
    return prepare(
        source=text.source,
        output=text.data_dir,
        vocab_size=text.vocab_size,
        val_fraction=text.val_fraction,
        max_bytes=text.max_bytes,
    ).inputs
