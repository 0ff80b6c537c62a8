"""Callbacks of every run: repeatable randomness, checkpoints, the model directory."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from moezoo.errors import InputError, check_choice
from moezoo_train.adapters.lightning import (
    forget_sigterm,
    is_validation_due,
    mark_saved,
    save_last,
)
from moezoo_train.parallel.distributed import gather_from_ranks
from moezoo_train.run.stopping import StopSignals

if TYPE_CHECKING:
    from moezoo_train.trained import Savable


class RandomState(Callback):
    """Make the randomness of training depend on the training batches alone, and resumable.

    The generators' states after each batch are put back before the next, so that validation,
    sampling or logging in between draws nothing from training's stream; a checkpoint holds the
    state of every rank. Resumed with another number of ranks, the fresh seeds stay.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take this rank's state from a loaded checkpoint."""
        if self._loaded is None:
            return
        if len(self._loaded) == trainer.world_size:
            self._state = self._loaded[trainer.global_rank]
        else:
            rank_zero_warn(
                f"the checkpoint was written by {len(self._loaded)} processes, this run has "
                f"{trainer.world_size}: random numbers continue from the seed"
            )
        self._loaded = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the state back."""
        if self._state is not None:
            set_random_state(self._state)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remember the state."""
        self._state = get_random_state()

    def state_dict(self) -> dict[str, Any]:
        """Gather the states of all ranks."""
        return {"ranks": gather_from_ranks(self._state or get_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the loaded states until training starts."""
        self._loaded = state_dict["ranks"]


def get_random_state() -> dict[str, Any]:
    """Return the states of all global generators, as numbers and tensors only."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set all global generators to what :func:`get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class SameCheckpoint(Callback):
    """See that all processes of a run go on from one checkpoint, or all begin anew.

    Each looks into the run's directory by itself, before processes have met; where that is not the
    same place for all of them, they would wait for each other forever.

    Args:
        path: where this process goes on from; None if it begins anew.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            InputError: in all processes, if they differ.
        """
        found = gather_from_ranks(self._path)
        for rank, path in enumerate(found):
            if path != found[0]:
                raise InputError(
                    f"ckpt_path: process 0 begins from {found[0]}, process {rank} from {path}; "
                    "give an output that all of them see"
                )


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``: every n optimizer steps, at the end, and when a signal asks to stop.

    Always between optimizer steps, and behind a validation that is due, so that a resumed run
    repeats the uninterrupted one exactly: Lightning would not make up for that validation.

    Args:
        path: the folder of checkpoints.
        every_n_steps: optimizer steps between checkpoints.

    Attributes:
        every_n_steps: as given.
        stopped_by: the signal that ended the run, the same in all processes; None without.
    """

    def __init__(self, path: str | Path, every_n_steps: int) -> None:
        super().__init__(
            dirpath=path,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.stopped_by: signal.Signals | None = None
        self._signals = StopSignals()
        self._waiting = False
        self._between_steps = False
        self._finished_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run stands, so that no half-accumulated step is saved."""
        super().on_train_start(trainer, pl_module)
        self._finished_step = trainer.global_step
        mark_saved(self, trainer.global_step)
        if trainer.received_sigterm:
            self._signals.asked = signal.SIGTERM
        forget_sigterm(trainer)
        # Lightning's own handler would leave several processes in the middle of a step, without a
        # checkpoint, after a broadcast that meets whatever the others are exchanging.
        self._signals.install(launched=trainer.world_size > 1, first=trainer.is_global_zero)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or if the run was asked to stop and a step has just ended."""
        self._between_steps = trainer.global_step != self._finished_step
        self._finished_step = trainer.global_step
        if not self._between_steps:
            return
        validating = is_validation_due(trainer)
        if self._stops(trainer) and not validating:
            trainer.limit_val_batches = 0  # Lightning validates what is stopped early
        if self.stopped_by or trainer.global_step % self.every_n_steps == 0:
            self._waiting = validating
            if not validating:
                save_last(self, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what had to wait, or if the run was asked to stop meanwhile."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self._between_steps and self.stopped_by is None and self._stops(trainer):
            self._waiting = True
        if self._waiting:
            self._waiting = False
            save_last(self, trainer)

    def _stops(self, trainer: Trainer) -> bool:
        """Agree whether a process was asked to stop; all processes must call this together."""
        agree, asked = trainer.strategy.reduce_boolean_decision, self._signals.asked
        if not agree(asked is not None, all=False):
            return False
        interrupted = agree(asked == signal.SIGINT, all=False)
        self.stopped_by = signal.SIGINT if interrupted else signal.SIGTERM
        trainer.should_stop = True
        return True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        save_last(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the earlier signal handlers; a signal during the last save still counts."""
        super().teardown(trainer, pl_module, stage)
        self._signals.restore()
        if self._signals.asked == signal.SIGINT:
            self.stopped_by = self._signals.asked

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the earlier signal handlers."""
        super().on_exception(trainer, pl_module, exception)
        self._signals.restore()


class BestCheckpoint(ModelCheckpoint):
    """Keep ``best.ckpt``, of the lowest validation loss; one that is not finite is never it.

    Args:
        path: the folder of checkpoints.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            dirpath=path,
            filename="best",
            monitor="val/loss",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the lowest loss so far, also where the run's directory has another name.

        Where that directory holds no best.ckpt, the next validation is the best.
        """
        path, score = Path(cast(str, self.dirpath)) / "best.ckpt", state_dict["best_model_score"]
        if score is None or not path.exists():
            return
        self.current_score = state_dict.get("current_score")
        self.best_model_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = str(path)
        self.best_k_models = {str(path): score}

    @property
    def state_key(self) -> str:
        """As Lightning's own, whose state is in checkpoints of earlier versions."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a loss is the best so far; Lightning takes NaN where there is no other."""
        if current is not None and not current.isfinite():
            return False
        return super().check_monitor_top_k(trainer, current)


class SaveModel(Callback):
    """Keep a Hugging Face directory of the model, its tokenizer beside the weights.

    Args:
        path: the directory.
        keep: ``last`` writes at each validation and at the end; ``best`` at each validation whose
            loss is the lowest so far, at the end if there was no validation.
    """

    def __init__(self, path: str | Path, keep: Literal["last", "best"] = "last") -> None:
        self.path = Path(path)
        self.keep = check_choice("keep", keep, ["last", "best"])
        self._best = float("inf")
        self._validated = False
        self._saved_step = -1
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the run has steps left."""
        self._trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, if this state is to be kept."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        loss = float(trainer.callback_metrics.get("val/loss", float("inf")))
        self._validated = True
        if self.keep == "last" or loss < self._best:
            self._write(trainer, pl_module)
        self._best = min(self._best, loss)  # not NaN, which is less than nothing

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, unless the best one is kept."""
        if self.keep == "last" or not self._validated:
            self._write(trainer, pl_module)
        elif self._best == float("inf"):
            rank_zero_warn(
                f"no validation loss was finite, so none is the best and {self.path} is not "
                "written; the final state is in last.ckpt"
            )

    def catch_up(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Write the final state where a resumed run had no step left, so that none of this ran.

        Killed between its last checkpoint and the directory, a run would never have it.

        Returns:
            The line that says so; None where the run had steps left.
        """
        if self._trained:
            return None
        if self._saved_step < 0 and (self.keep == "last" or not self._validated):
            self._write(trainer, pl_module)
        return (
            f"nothing was trained, as the run has its {trainer.global_step} steps; a larger "
            "trainer.max_steps or trainer.max_epochs goes on"
        )

    def state_dict(self) -> dict[str, Any]:
        """Remember the lowest loss."""
        return {"best": self._best, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the lowest loss so far, unless the model that had it is missing."""
        best = state_dict["best"]
        if best == float("inf") or self.path.exists():
            self._best = best
            self._validated = state_dict.get("validated", best < float("inf"))

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        if self._saved_step != trainer.global_step:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            cast("Savable", pl_module).save(self.path, tokenizer)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("save_model")
