"""Lightning's loop over batches, such that a run is a sequence of whole optimizer steps.

Lightning counts batches. It may validate, stop and save within an optimizer step, and what it saves
tells a resumed run in which hook it was saved, from which the rest is guessed: epochs are counted
twice, logged steps are missed. Here whoever asks for a validation or a stop gets it when the step
has ended, and a checkpoint says where the run stands between two batches, and no more.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

from moezoo_train.adapters.lightning import (
    DataFetcher,
    EpochLoop,
    estimated_steps,
    is_last_step,
)

_TRACKED = ("ready", "started", "processed", "completed")


class StepLoop(EpochLoop):
    """Lightning's loop over the batches of an epoch, by whole optimizer steps."""

    @property
    def done(self) -> bool:
        """Return whether to leave the loop: never within a step, whoever asks to stop."""
        return super().done and not self.accumulates()

    def reset(self) -> None:
        """Begin an epoch, or go on in it."""
        super().reset()
        self.count_logged_steps()  # Lightning's own count is off by one in some resumed runs

    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        """Validate if that is due."""
        super().on_advance_end(data_fetcher)
        self.count_logged_steps()  # Lightning's own count is off by one in some resumed runs

    def validation_is_due(self, data_fetcher: DataFetcher) -> bool:
        """Return whether a validation is due: one that falls within a step waits for its end.

        The last step of a run is always followed by one.
        """
        if self.accumulates():
            return False
        if super().validation_is_due(data_fetcher) or self._validation_waits():
            return True
        return self.trainer.enable_validation and is_last_step(self.trainer)

    def _validation_waits(self) -> bool:
        every = self.trainer.val_check_batch
        if not isinstance(every, int) or not self.validates_in_epoch():
            return False  # by time, or at the end of data of unknown length
        across_epochs = self.trainer.check_val_every_n_epoch is None
        last = (self.total_batch_idx if across_epochs else self.batch_idx) + 1
        in_step = (self.batch_progress.current.ready - 1) % self.trainer.accumulate_grad_batches + 1
        return last // every > (last - in_step) // every


def take_whole_steps(trainer: Trainer) -> None:
    """Set a trainer's loop, before it reads a checkpoint."""
    lightnings = trainer.fit_loop.epoch_loop
    if not isinstance(lightnings, StepLoop):
        loop = StepLoop(trainer)
        vars(loop).update(vars(lightnings))  # its limits, its counts, and where validation data is
        trainer.fit_loop.epoch_loop = loop


def run_steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps that a run makes at most; None if nothing bounds them."""
    steps = estimated_steps(trainer)
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def stand_between_batches(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Set a checkpoint's progress to where the run stands, whichever hook saves it; in place.

    An epoch counts when all its batches are done, not when the run ends within it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    within = batches["current"]["processed"]
    whole = batches["is_last_batch"] or within >= trainer.num_training_batches
    for part in ("total", "current"):
        done = batches[part]["processed"]
        batches[part].update(dict.fromkeys(_TRACKED, done))
        begun, finished = epochs[part]["ready"], epochs[part]["processed"]
        if whole:
            finished = begun
        elif within:
            finished = begun - 1
        else:
            begun = finished  # it begins when its first batch is trained on
        epochs[part].update(ready=begun, started=begun, processed=finished, completed=finished)
    if whole:
        batches["is_last_batch"] = False
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        progress = (loops["epoch_loop.scheduler_progress"], *optimizer.values(), batches)
        for current in (counts["current"] for counts in progress):
            current.update(dict.fromkeys(current, 0))
    # A validation that was due has been made; one never goes on where another ended.
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        validation[part].update(dict.fromkeys(_TRACKED, 0))
    validation["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
    checkpoint["epoch"] = epochs["current"]["completed"]
