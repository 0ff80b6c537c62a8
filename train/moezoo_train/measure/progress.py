"""A run's output while it trains: one line of progress, and none of the libraries' messages."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moezoo_train.measure.metrics import is_logged

_CHATTER = re.compile(
    r"litlogger|litmodels|^Seed set to|^(GPU|TPU|HPU) available|^`Trainer\.fit` stopped"
    r"|^Using .*(bfloat16|16bit) .*AMP|^Restor(ing|ed) |^Loaded model weights"
    r"|^`Trainer\(limit_|Received SIGTERM"
    r"|^\s*Detected KeyboardInterrupt|^Loading `train_dataloader` to estimate"
)
_WARNINGS = (
    # Memory-mapped windows cost less than handing them from a worker process.
    r"The '\w+' does not have many workers",
    # Ours resumes: the sampler's order depends on the seed and the step alone.
    r"You're resuming from a checkpoint that ended before the epoch ended",
    # A resumed run writes where it wrote before, or to where the user moved it.
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
    # Evaluation needs none of the callbacks of training.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # What is logged has been summed over processes already.
    r"It is recommended to use `self\.log\('(step|tokens|val/\w+|test/\w+)', .*sync_dist=True",
    # Lightning's own business with torch's pytrees.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


_OURS = ("moezoo", "moezoo_kernels", "moezoo_models", "moezoo_train")


def quiet_lightning() -> None:
    """Silence the messages of Lightning that tell a user nothing; any other still comes through.

    Our own warnings become lines like those of errors, without the place in the code.
    """
    if not isinstance(warnings.formatwarning, _Format):
        warnings.formatwarning = _Format(warnings.formatwarning)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for place in _places():
        place.addFilter(_not_chatter)


@contextmanager
def quieted() -> Iterator[None]:
    """Silence the same messages while this is open, and no longer."""
    places = list(_places())
    before = [list(place.filters) for place in places]
    form = warnings.formatwarning
    try:
        with warnings.catch_warnings():
            quiet_lightning()
            yield
    finally:
        warnings.formatwarning = form
        for place, filters in zip(places, before, strict=True):
            place.filters[:] = filters


class _Format:
    """``warnings.formatwarning`` that shortens our own; Lightning has one of its own."""

    def __init__(self, others: Callable[..., str]) -> None:
        self._others = others

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is UserWarning and _is_ours(Path(filename)):
            return f"moezoo: warning: {message}\n"
        return self._others(message, category, filename, lineno, line)


def _is_ours(file: Path) -> bool:
    """Return whether a file of code is of one of our packages."""
    homes = (getattr(sys.modules.get(name), "__file__", None) for name in _OURS)
    return any(home is not None and file.is_relative_to(Path(home).parent) for home in homes)


def _places() -> Iterator[logging.Filterer]:
    """Yield the loggers and handlers by which Lightning's messages go."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        yield from logging.getLogger(name).handlers
        yield logging.getLogger(f"{name}.utilities.rank_zero")
        yield logging.getLogger(f"{name}.utilities.seed")


def _not_chatter(record: logging.LogRecord) -> bool:
    return _CHATTER.search(record.getMessage()) is None


class StepProgress(ProgressBar):
    """A bar over optimizer steps with loss, tokens per second and MFU.

    Where the output is no terminal, a line for every tenth of the run and for every validation.

    Args:
        console: where to write; default: standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._enabled = True
        self._total: int | None = None
        self._printed = 0

    def disable(self) -> None:
        """Stop writing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Write again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        steps = trainer.estimated_stepping_batches
        self._total = int(steps) if steps not in (float("inf"), -1) else None
        self._printed = trainer.global_step
        self._start("train", self._total, trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the state that the last batch left; its metrics are complete only now."""
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=self._status(trainer))
        elif self._enabled and self._is_due(step, trainer):
            self._print(trainer)

    def _is_due(self, step: int, trainer: Trainer) -> bool:
        return (
            step > 0
            and is_logged(trainer, step)
            and step - self._printed >= (self._total or 1000) // 10
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state of the bar."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=trainer.global_step,
                status=self._status(trainer),
            )
        elif self._enabled and self._printed < trainer.global_step:
            self._print(trainer)
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the terminal."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that it validates, or a bar of its own outside training."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._start("evaluate", _batches(trainer.num_val_batches), 0)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="validate")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar of an evaluation."""
        if trainer.state.fn != TrainerFn.FITTING and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation loss."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()
        elif self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], description="train", status=self._status(trainer)
            )
        elif self._enabled and not trainer.sanity_checking:
            self._print(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar."""
        self._start("evaluate", _batches(trainer.num_test_batches), 0)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar."""
        self._stop()

    def _start(self, description: str, total: int | None, completed: int) -> None:
        if not (self._enabled and self.console.is_terminal):
            return
        self._stop()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            refresh_per_second=4,
        )
        self._bar.add_task(description, total=total, completed=completed, status="")
        self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, trainer: Trainer) -> None:
        self._printed = trainer.global_step
        total = "" if self._total is None else f"/{self._total}"
        self.console.print(f"step {trainer.global_step}{total}  {self._status(trainer)}")

    def _status(self, trainer: Trainer) -> str:
        metrics = trainer.callback_metrics
        shown = (
            ("train/loss", "loss {:.3f}", 1),
            ("val/loss", "val {:.3f}", 1),
            ("train/tokens_per_second", "{:.1f}k tok/s", 1e-3),
            ("train/mfu", "MFU {:.0f} %", 100),
        )
        return "  ".join(
            text.format(float(metrics[name]) * scale)
            for name, text, scale in shown
            if name in metrics
        )


def _batches(number: int | float | list[int | float]) -> int | None:
    total = sum(number) if isinstance(number, list) else number
    return None if total == float("inf") else int(total)
