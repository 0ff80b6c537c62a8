"""Private API of Lightning, as of 2.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loops import _TrainingEpochLoop
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer


class EpochLoop(_TrainingEpochLoop):
    """The loop over the batches of an epoch, with hooks that a subclass may override.

    Uses ``_should_check_val_fx``, ``_should_check_val_epoch``, ``_should_accumulate`` and
    ``_batches_that_stepped``: Lightning has no public hook between a batch and its validation. If
    they are renamed, :meth:`validation_is_due` is no longer called, and validations fall within
    optimizer steps.
    """

    def validation_is_due(self, data_fetcher: DataFetcher) -> bool:
        """Return whether Lightning validates after this batch."""
        return super()._should_check_val_fx(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: DataFetcher) -> bool:
        return self.validation_is_due(data_fetcher)

    def validates_in_epoch(self) -> bool:
        """Return whether there are validations in this epoch."""
        return self._should_check_val_epoch()

    def accumulates(self) -> bool:
        """Return whether the optimizer step of this batch is still to come."""
        return self._should_accumulate()

    def count_logged_steps(self) -> None:
        """Set the count of steps that loggers see to the number of optimizer steps."""
        self._batches_that_stepped = self.global_step


def is_validation_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch that has just ended.

    Uses ``_FitLoop._data_fetcher`` and ``_TrainingEpochLoop._should_check_val_fx``: callbacks are
    not told. If renamed: AttributeError after the first batch.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def accumulates(trainer: Trainer) -> bool:
    """Return whether gradients are still accumulated after this batch.

    Uses ``_FitLoop._should_accumulate``, which knows of an epoch's last batch. If renamed:
    AttributeError in the first backward pass.
    """
    return trainer.fit_loop._should_accumulate()


def is_last_step(trainer: Trainer) -> bool:
    """Return whether a run ends as planned behind the step that has just ended.

    That is by steps, epochs or time, or as a callback asked for it, such as early stopping. Uses
    ``_FitLoop._can_stop_early`` and ``_TrainingEpochLoop._num_ready_batches_reached``: Lightning
    decides when it is about to begin the next step. If renamed: AttributeError after the first
    batch.
    """
    loop = trainer.fit_loop
    if 0 <= loop.max_steps <= loop.epoch_loop.global_step:
        return True
    if trainer.should_stop and loop._can_stop_early:
        return True
    epochs = -1 if loop.max_epochs is None else loop.max_epochs
    last_epoch = 0 <= epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def estimated_steps(trainer: Trainer) -> float:
    """Return the number of optimizer steps, and leave the training data as it was.

    Uses ``_FitLoop._combined_loader`` and ``_data_fetcher``: ``estimated_stepping_batches`` opens
    the data to count its batches, and a worker may begin with the first, though a resumed run
    begins elsewhere. If renamed: AttributeError before training.
    """
    loop = trainer.fit_loop
    opened = loop._combined_loader is not None
    steps = trainer.estimated_stepping_batches
    if not opened:
        loop._combined_loader = loop._data_fetcher = None
    return steps


def forget_sigterm(trainer: Trainer) -> None:
    """Undo that a trainer has received SIGTERM.

    Uses ``Trainer._signal_connector``; ``Trainer.received_sigterm`` cannot be set. If renamed:
    AttributeError when training starts.
    """
    trainer._signal_connector.received_sigterm = False


def mark_saved(checkpoints: ModelCheckpoint, step: int) -> None:
    """Mark a step as one that a checkpoint callback need not save.

    Uses ``ModelCheckpoint._last_global_step_saved``. If renamed: a resumed run writes its
    checkpoint once more.
    """
    checkpoints._last_global_step_saved = step


def save_last(checkpoints: ModelCheckpoint, trainer: Trainer) -> None:
    """Write ``last.ckpt``, unless this step has been saved.

    Uses ``ModelCheckpoint._should_skip_saving_checkpoint``, ``_save_last_checkpoint`` and
    ``_monitor_candidates``: the public hooks choose the moment themselves. If renamed:
    AttributeError at the first checkpoint.
    """
    if not checkpoints._should_skip_saving_checkpoint(trainer):
        checkpoints._save_last_checkpoint(trainer, checkpoints._monitor_candidates(trainer))


def finish_closure(precision: Precision, module: LightningModule, optimizer: Optimizer) -> None:
    """Call the hooks between backward pass and optimizer step, gradient clipping among them.

    Uses ``Precision._after_closure``, which only the optimizer steps of Lightning's own strategies
    call. If renamed: AttributeError in the first step under ZeRO.
    """
    precision._after_closure(module, optimizer)


def set_data_parallel(strategy: ModelParallelStrategy, processes: int) -> None:
    """Set up data of its own for each process.

    Uses ``ModelParallelStrategy._data_parallel_size`` and ``_tensor_parallel_size``: the number of
    processes is known after the constructor that takes them. If renamed: processes of a node get
    the same data, which tests against one process notice.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = processes, 1


def load_beside_parameters(strategy: Strategy) -> None:
    """Have a strategy load each parameter's optimizer state to where the parameter is.

    Lightning moves all of it to the strategy's device, where the moments of a table in main memory
    may not fit. Replaces ``Strategy.load_optimizer_state_dict``, whose states torch has put beside
    the parameters already. If renamed: a resumed run needs room for the moments.
    """

    def load(checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(strategy.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    strategy.load_optimizer_state_dict = load  # type: ignore[method-assign]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer that has the module; None without.

    Uses ``LightningModule._trainer``: the public property raises without a trainer. If renamed:
    AttributeError when a checkpoint is read without one.
    """
    return module._trainer


def rank_of_launcher() -> int | None:
    """Return the rank that a launcher's environment names; None without a launcher.

    Uses ``lightning.fabric.utilities.rank_zero._get_rank``: the rank is needed before there is a
    strategy. If moved: ImportError.
    """
    return _get_rank()


class HookedCLI(LightningCLI):
    """LightningCLI with public names for the steps that a run changes.

    Uses ``_parse_ckpt_path``, ``_run_subcommand``, ``_get`` and ``_subcommand_parsers``: public
    methods cover neither the checkpoint's path nor errors of a subcommand. If renamed: the path
    ``last`` is not found, or AttributeError before anything is trained.
    """

    def set_ckpt_path(self) -> None:
        """Set the configuration's ``ckpt_path``."""
        super()._parse_ckpt_path()

    def _parse_ckpt_path(self) -> None:
        self.set_ckpt_path()

    def run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand of the trainer."""
        super()._run_subcommand(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def instantiated(self, key: str) -> Any:
        """Return what a key of the configuration was instantiated to."""
        return self._get(self.config_init, key)

    def subcommand_parser(self, name: str) -> LightningArgumentParser:
        """Return a subcommand's parser."""
        return self._subcommand_parsers[name]
