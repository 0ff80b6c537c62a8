"""``moezoo fit``, ``validate`` and ``test``: LightningCLI around the model, the data and a run.

Everything of a run lies in one directory::

    runs/NAME/config.yaml           what it was told, complete
    runs/NAME/checkpoints/*.ckpt    last.ckpt and best.ckpt, to resume from
    runs/NAME/model/                the model as a Hugging Face directory, with its tokenizer
    runs/NAME/adapter/              the adapters alone, if that is what was trained
    runs/NAME/metrics.csv           and tensorboard/
    runs/NAME/report.json, loss.png, sample.txt
"""

from __future__ import annotations

import signal
import sys
from argparse import SUPPRESS
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from moezoo.command.keys import full_keys
from moezoo.errors import InputError, check_int, check_text, going_on
from moezoo_models.checkpoints.directory import one_line
from moezoo_models.checkpoints.locks import writing
from moezoo_train.adapters.lightning import HookedCLI
from moezoo_train.checkpoint.files import AtomicCheckpointIO, BackgroundCheckpointIO
from moezoo_train.checkpoint.restoring import CheckKinds, restoring_errors
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.finetune.pretrained import default_tokenizer
from moezoo_train.measure.loggers import build_loggers
from moezoo_train.measure.progress import StepProgress, quiet_lightning
from moezoo_train.measure.report import Report, write_report
from moezoo_train.parallel.distributed import is_lost_process
from moezoo_train.parallel.fsdp2 import writes_directories
from moezoo_train.run.beforehand import check_evaluation, check_run
from moezoo_train.run.callbacks import BestCheckpoint, LastCheckpoint, SameCheckpoint, SaveModel
from moezoo_train.run.described import describe_model
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.parser import ABOUT, Parser, SaveConfig
from moezoo_train.run.precision import RunTrainer, resolve
from moezoo_train.run.refusals import (
    batch_counts,
    check_trainer,
    check_validation_interval,
    is_refusal,
    reword,
)
from moezoo_train.run.run_directory import (
    check_directory,
    clean,
    find_checkpoint,
    find_stale,
    is_first,
    say_anew,
)
from moezoo_train.run.stopping import NAMES, raising_interrupts, resume_command, say_interrupted

_LoggerName = Literal["csv", "tensorboard", "wandb"]
TRAINER_DEFAULTS = {
    "max_steps": 1000,
    "max_epochs": -1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "val_check_interval": 200,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


def run(argv: list[str]) -> None:
    """Run one command, e.g. ``["fit", "--config", "configs/demo.yaml"]``.

    Raises:
        InputError: something in the command line, the configuration or the data is wrong.
        SystemExit: with 0, after ``--help``; after a checkpoint, with 0 if SIGTERM ended the run,
            with 130 if Ctrl-C did.
        KeyboardInterrupt: Ctrl-C before training, or for the second time; says how to go on.
    """
    quiet_lightning()
    stopped_by = run_command(argv).stopped_by
    if stopped_by is not None:
        raise SystemExit(130 if stopped_by == signal.SIGINT else 0)


@restoring_errors()
def run_command(argv: list[str], quiet: bool = False) -> MoezooCLI:
    """Run one command as :func:`run` does, and return it with what it has built and found.

    Args:
        argv: its words.
        quiet: print neither progress nor the report.

    Raises:
        InputError: as :func:`run`.
        SystemExit: with 0, after ``--help``.
        KeyboardInterrupt: as :func:`run`.
    """
    command = _cli_of(argv)
    try:
        with ExitStack() as held:
            return command(
                LanguageModel,
                TokenDataModule,
                save_config_callback=SaveConfig,
                trainer_class=RunTrainer,
                trainer_defaults=dict(TRAINER_DEFAULTS),
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={name: ABOUT[name] for name in command.subcommands()},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=argv,
                held=held,
                quiet=quiet,
            )
    except (MisconfigurationException, ValueError) as error:
        if not is_refusal(error):
            raise
        raise InputError(reword(error)) from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise InputError(
            f"trainer: another process of this run has ended or does not answer "
            f"({one_line(error)}); see what it said last, then go on with --ckpt_path last"
        ) from error


class MoezooCLI(HookedCLI):
    """LightningCLI with a run directory.

    Args:
        held: holds the lock of the directory, until whoever gave it lets it go.
        quiet: print neither progress nor the report.

    Attributes:
        report: of a run that was trained to its end.
        stopped_by: the signal that ended it before; None without.
    """

    def __init__(
        self, *args: Any, held: ExitStack | None = None, quiet: bool = False, **kwargs: Any
    ) -> None:
        self._held = held or ExitStack()
        self._quiet = quiet
        self.report: Report | None = None
        self.stopped_by: signal.Signals | None = None
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the commands, with the arguments of theirs that a user cannot give."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options."""
        group = parser.add_argument_group("Run")
        group.add_argument(
            "--recipe",
            type=str,
            default=SUPPRESS,
            help="a recipe that comes with moezoo, such as peer; `moezoo zoo` names them",
        )
        group.add_argument(
            "--output", type=str, default="runs/default", help="directory of the run"
        )
        group.add_argument(
            "--overwrite", type=bool, default=False, help="replace a run that is already there"
        )
        group.add_argument(
            "--loggers",
            type=_LoggerName | list[_LoggerName],
            default=["csv", "tensorboard"],
            help="where metrics go; metrics.csv is always written",
        )
        group.add_argument(
            "--checkpoint_every", type=int, default=200, help="optimizer steps between last.ckpt"
        )
        group.add_argument(
            "--checkpoint_async",
            type=bool,
            default=False,
            help="write checkpoints while training goes on, from a copy in main memory",
        )
        group.add_argument(
            "--keep",
            type=Literal["last", "best"],
            default="last",
            help="what model/ holds: the last state, or the one of the lowest validation loss",
        )
        group.add_argument(
            "--sample_prompt", type=str, default="", help="begins the text in sample.txt"
        )
        group.add_argument(
            "--sample_tokens", type=int, default=200, help="length of that text; 0 for none"
        )
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without Lightning's warning that arguments were also on the command line."""
        self.config = parser.parse_args(args)
        if "recipe" in self.config[self.config.subcommand]:
            raise InputError("recipe: belongs on the command line; write --recipe NAME there")

    def set_ckpt_path(self) -> None:
        """Find the checkpoint; it does not override the configuration."""
        command = self.config.subcommand
        config = self.config[command]
        output = Path(config["output"])
        self._writes = command == "fit" and not config["trainer"].get("fast_dev_run")
        if self._writes:
            check_directory(output)
            if is_first():
                self._held.enter_context(writing(output))
                clean(output)
        given = config.get("ckpt_path") or (None if command == "fit" else "last")
        found = given and find_checkpoint(output, given, command, config["overwrite"])
        config["ckpt_path"] = found
        self._anew = given is not None and found is None
        self._going_on = f"going on from {found}" if given == "auto" and found else None

    def before_instantiate_classes(self) -> None:
        """Refuse what the options alone show, and to mix the run with another."""
        config = self.config[self.subcommand]
        check_int("checkpoint_every", config["checkpoint_every"])
        check_int("sample_tokens", config["sample_tokens"], minimum=0)
        for name, number in batch_counts(config["trainer"]).items():
            config["trainer"][name] = number
        check_trainer(config["trainer"])
        config["trainer"]["precision"], self._on_precision = resolve(
            config["trainer"], config["ckpt_path"]
        )
        check_text("sample_prompt", config["sample_prompt"])
        check_validation_interval(config["trainer"])
        data = config["data"]
        text = data["source"] is not None or data["sources"] is not None
        if text and data["tokenizer"] is None:
            data["tokenizer"] = default_tokenizer(config["model"]["initialize_from"])
        output = Path(config["output"])
        if self._writes and config["ckpt_path"] is None and is_first():
            stale = find_stale(output, config["overwrite"] or self._anew)
            self.save_config_kwargs["stale"] = stale
        if self._anew and is_first():
            say_anew(output)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; Lightning's version calls what jsonargparse deprecates."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self.instantiated("data")
        self.model = self.instantiated("model")
        self.trainer = self.instantiate_trainer()

    def run_subcommand(self, subcommand: str) -> None:
        """Run it; mistakes in the data, which show only now, name their full key too."""
        with full_keys(self.config[subcommand]):
            super().run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what belongs to the run directory to what the configuration says."""
        config = self.config_init[self.subcommand]
        trainer = config["trainer"]
        output = Path(config["output"])
        plugins = _as_list(trainer.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            background = self.subcommand == "fit" and config["checkpoint_async"]
            writer = BackgroundCheckpointIO() if background else AtomicCheckpointIO()
            kwargs["plugins"] = [*plugins, writer]
        kwargs["default_root_dir"] = trainer.get("default_root_dir") or str(output)
        kwargs["callbacks"] = [*_as_list(trainer.get("callbacks")), *self._callbacks(output)]
        if self.subcommand == "fit":
            own = trainer.get("logger")
            given = [] if own in (None, True, False) else _as_list(own)
            kwargs["logger"] = build_loggers(
                [] if own is False else _as_list(config["loggers"]), output
            )
            kwargs["logger"] += given
        else:
            kwargs["logger"] = False
        try:
            built = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise InputError(reword(error)) from error
        if config["checkpoint_async"] and writes_directories(built.strategy):
            raise InputError(
                "checkpoint_async: the files of save_distributed_checkpoint are not written in the "
                "background; set one of the two to false"
            )
        return built

    def _callbacks(self, output: Path) -> list[Callback]:
        config = self.config_init[self.subcommand]
        callbacks: list[Callback] = [CheckKinds(), SameCheckpoint(config["ckpt_path"])]
        if config["trainer"].get("enable_progress_bar") is not False:
            callbacks.append(StepProgress(Console(quiet=True) if self._quiet else None))
        if self.subcommand == "fit" and config["trainer"].get("enable_checkpointing") is not False:
            folder = output / "checkpoints"
            callbacks += [
                SaveModel(output / "model", config["keep"]),
                BestCheckpoint(folder),
                LastCheckpoint(folder, config["checkpoint_every"]),
            ]
        return callbacks

    def before_fit(self) -> None:
        """Refuse what preparing the text would not make right."""
        check_run(self.trainer, self.model, self.datamodule, self.config["fit"]["ckpt_path"])
        # What was chosen, or costs time; after what is refused, which is one line.
        said = describe_model(self.config["fit"]["model"], self.model.model.config)
        for line in (self._on_precision, said, self._going_on):
            self._say(line)

    def before_validate(self) -> None:
        """As before training."""
        checkpoint = self.config[self.subcommand]["ckpt_path"]
        check_evaluation(self.trainer, self.model, self.datamodule, checkpoint)
        self._say(self._on_precision)

    def _say(self, line: str | None) -> None:
        if line and is_first() and not self._quiet:
            print(line, file=sys.stderr)

    def before_test(self) -> None:
        """As before training."""
        self.before_validate()

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        output = Path(self.config["fit"]["output"])
        try:
            with raising_interrupts():
                self.trainer.fit(**kwargs)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(say_interrupted(output)) from stop

    def validate(self, **kwargs: Any) -> None:
        """Measure on validation data."""
        with raising_interrupts():
            self.trainer.validate(**kwargs)

    def test(self, **kwargs: Any) -> None:
        """Measure on test data."""
        with raising_interrupts():
            self.trainer.test(**kwargs)

    def after_fit(self) -> None:
        """Report, unless the run was asked to stop."""
        config = self.config_init[self.subcommand]
        output = Path(config["output"])
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint) and callback.stopped_by is not None:
                self.stopped_by = callback.stopped_by
                same = "as before " if self.trainer.world_size > 1 else ""
                self._say(
                    f"stopped by {NAMES[callback.stopped_by]} after step "
                    f"{self.trainer.global_step}; go on {same}with: {resume_command(output)}"
                )
                return
        for callback in _as_list(self.trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(callback, SaveModel):
                self._say(callback.catch_up(self.trainer, self.model))
        if self.trainer.is_global_zero and not config["trainer"].get("fast_dev_run"):
            with going_on(f"the run is finished, its report is not: {resume_command(output)}"):
                self.report = write_report(
                    output,
                    self.trainer,
                    self.model,
                    prompt=config["sample_prompt"],
                    sample_tokens=config["sample_tokens"],
                    console=Console(quiet=True) if self._quiet else None,
                )


def _cli_of(argv: list[str]) -> type[MoezooCLI]:
    """Return the CLI with no command but the one asked for: each parser takes long to build."""
    known = MoezooCLI.subcommands()
    asked = {name: known[name] for name in argv[:1] if name in known} or known
    one = type("OneCommand", (MoezooCLI,), {"subcommands": staticmethod(lambda: asked)})
    return cast("type[MoezooCLI]", one)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
