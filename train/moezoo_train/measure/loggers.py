"""Where metrics go: ``metrics.csv`` always, TensorBoard and Weights & Biases by choice."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moezoo.atomic import named_errors
from moezoo.errors import InputError, check_choice
from moezoo_models.checkpoints.atomic import atomic_write

LOGGERS = ("csv", "tensorboard", "wandb")
_EXTRAS = {"tensorboard": "train", "wandb": "wandb"}


class MetricsCSV(Logger):
    """One table of all metrics, a row per logged step; cells are empty where nothing was logged.

    Unlike Lightning's, it goes on where a resumed run left off, without the rows that the run
    will repeat.

    Args:
        path: the file, usually ``runs/NAME/metrics.csv``.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []
        self._written = 0

    @property
    def name(self) -> str:
        """Return what kind of logger this is."""
        return "csv"

    @property
    def version(self) -> str:
        """Return nothing: a run has one table."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the run's directory."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore: the run's configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row, if there is anything in it; nine digits hold a float32 exactly."""
        if not metrics:
            return
        row = {"step": "" if step is None else str(step)}
        row |= {name: f"{float(value):.9g}" for name, value in metrics.items()}
        same_step = takewhile(lambda known: known["step"] == row["step"], reversed(self._rows))
        if row not in same_step:  # Lightning gives the last one again where a run stops early
            self._rows.append(row)

    @rank_zero_only
    def start(self, step: int) -> None:
        """Begin at a step: keep the rows of the file up to it, and drop the later ones."""
        self._rows = [row for row in read_metrics(self.path) if int(row["step"]) <= step]
        self._columns = []
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date; new columns rewrite it, else the new rows are appended."""
        columns = list(dict.fromkeys([*self._columns, *_names(self._rows[self._written :])]))
        if columns != self._columns:
            self._columns = columns
            with atomic_write(self.path, "w") as file:
                self._writer(file).writeheader()
                self._writer(file).writerows(self._rows)
        elif self._written < len(self._rows):
            with named_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                self._writer(file).writerows(self._rows[self._written :])
        self._written = len(self._rows)

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files, of which a resumed run hides what it will repeat."""

    @rank_zero_only
    def start(self, step: int) -> None:
        """Begin at a step: TensorBoard shows nothing of later ones that was logged before."""
        if step:
            self.experiment.close()  # it opens a file again, which says from where on it holds
            self.experiment.purge_step = step + 1


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a ``metrics.csv``, without a last one that was cut off by a crash."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = [
        {name: value for name, value in row.items() if value}
        for row in csv.DictReader(lines)
        if None not in row and None not in row.values()
    ]
    return [row for row in rows if row.get("step", "").isdigit()]


def _names(rows: Iterable[dict[str, str]]) -> Iterable[str]:
    return dict.fromkeys(name for row in rows for name in row)


def build_loggers(names: Iterable[str], output: Path) -> list[Logger]:
    """Build the loggers of a run; the table always, as the report reads it.

    Raises:
        InputError: an unknown name, or a package that is not installed.
    """
    loggers: list[Logger] = [MetricsCSV(output / "metrics.csv")]
    for name in dict.fromkeys(names):
        check_choice("loggers", name, LOGGERS)
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise InputError(
                f"loggers: {name} is not installed; run: pip install 'moezoo[{_EXTRAS[name]}]', or "
                "leave it out"
            )
        if name == "tensorboard":
            loggers.append(TensorBoard(str(output), name="", version="tensorboard"))
        elif name == "wandb":
            loggers.append(WandbLogger(name=output.name, save_dir=str(output)))
    return loggers
