"""The parser of a training run's options, and the file that it writes them to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moezoo.command.help_groups import FLAG, grouped
from moezoo.command.names import with_method_words
from moezoo.command.parser import ClearErrors, subparsers
from moezoo.command.recipes import with_recipes
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_train.run.presets import with_preset
from moezoo_train.run.run_directory import remove

ABOUT = {
    "fit": {"description": "Train a model as YAML files and options say; options win."},
    "validate": {"description": "Measure a checkpoint on validation data."},
    "test": {"description": "Measure a checkpoint on test data, which is the validation split."},
}
"""Arguments of the commands' parsers."""


class Parser(ClearErrors, LightningArgumentParser):
    """Lightning's parser, with mistakes as one clear line, and help on our own options first."""

    trainer_page = False
    """Whether help shows the options of Lightning's trainer, and no others."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Write the help, of one page or the other."""
        with grouped(self, self.trainer_page):
            return super().format_help(*args, **kwargs)

    def arranged(self, words: Sequence[str]) -> list[str]:
        """Return the words in order, with names of recipes, presets and methods written out."""
        if FLAG in words:
            for parser in subparsers(self):
                parser.trainer_page = True
            words = ["--help" if word == FLAG else word for word in words]
        arranged = with_preset(super().arranged(with_recipes(words)))
        return with_method_words(arranged, "model.ffn")


class SaveConfig(SaveConfigCallback):
    """Write the complete configuration of a training run to ``config.yaml``, once it starts.

    Args:
        stale: files of an earlier run, removed when this one begins, and not before.
    """

    def __init__(self, *args: Any, stale: list[Path] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stale = stale or []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: what is wrong with the configuration may show only now."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it whole."""
        if trainer.is_global_zero:
            remove(self._stale)
            with atomic_write(Path(self.config["output"]) / self.config_filename, "w") as file:
                # With what is null: the default of data.source, e.g., is another.
                file.write(self.parser.dump(self.config, skip_unset=False))
