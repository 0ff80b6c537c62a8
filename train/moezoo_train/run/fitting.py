"""``moezoo_train.fit``: a training run from Python, as ``moezoo fit`` does it."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moezoo.command.explanations import explain
from moezoo.command.names import check_names
from moezoo.command.settings import read_settings
from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import is_there
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.progress import quieted
from moezoo_train.measure.report import Report
from moezoo_train.run.callbacks import get_random_state, set_random_state
from moezoo_train.run.cli import run_command
from moezoo_train.run.stopping import NAMES, resume_command

_OPTION = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?")
_NOT_HERE = ("config", "help", "print_config")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class FitResult:
    """The outcome of a training run.

    Attributes:
        output: the run's directory.
        report: its figures, as in ``report.json``; None if it was stopped, and for
            ``trainer.fast_dev_run``, which writes nothing.
        metrics: the rows of ``metrics.csv``, numbers by name; also those of the run that this one
            went on with.
        stopped_by: ``"SIGTERM"`` if that ended the run; None without.
    """

    output: Path
    report: Report | None
    metrics: list[dict[str, float]]
    stopped_by: str | None = None

    @property
    def model(self) -> Path | None:
        """The Hugging Face directory of the trained model; None if none was written."""
        return self._there("model")

    @property
    def adapter(self) -> Path | None:
        """The directory of low-rank adapters, if those are what was trained."""
        return self._there("adapter")

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from."""
        return self._there("checkpoints/last.ckpt")

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the lowest validation loss."""
        return self._there("checkpoints/best.ckpt")

    @property
    def train_losses(self) -> dict[int, float]:
        """Training losses in nats per token, by step; means since the step before in it."""
        return self._series("train/loss")

    @property
    def val_losses(self) -> dict[int, float]:
        """Validation losses in nats per token, by step."""
        return self._series("val/loss")

    def _series(self, name: str) -> dict[int, float]:
        return {int(row["step"]): row[name] for row in self.metrics if name in row}

    def _there(self, name: str) -> Path | None:
        return self.output / name if is_there(self.output / name) else None


def fit(
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    quiet: bool = False,
    **overrides: Any,
) -> FitResult:
    """Train a model as ``moezoo fit`` does, with the same options, checks and files.

    The process is left as it was: global random numbers, warnings, handlers of signals and loggers'
    filters are those of before. Ctrl-C and SIGTERM end a run as they end the command, at the end of
    a step and after a checkpoint; SIGTERM then goes on to whatever handled it before.

    Args:
        config: what a YAML file of ``moezoo fit`` holds, as a mapping, or the path of such a file;
            default: nothing but the options' defaults.
        quiet: print neither progress nor the report; preparing a text still says so, on standard
            error.
        overrides: options as on the command line, which overrule ``config``: ``output="runs/a"``,
            ``recipe="peer"``, and with dots ``**{"trainer.max_steps": 20}``. A mapping is merged
            into a group: ``trainer={"max_steps": 20}``.

    Returns:
        Paths, figures and losses of the run.

    Raises:
        InputError: something in the configuration, the data or the machine is wrong; one line that
            names the key and the fix, as the command prints.
        KeyboardInterrupt: Ctrl-C; says how to go on.
    """
    words = ["fit", *_words(config, overrides)]
    with _as_before():
        try:
            command = run_command(words, quiet)
        except Exception as error:
            if (line := explain(error)) is None:
                raise
            raise InputError(line) from error
    output = Path(command.config["fit"]["output"])
    if command.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt(f"stopped; go on with: {resume_command(output)}")
    if command.stopped_by is not None:
        signal.raise_signal(command.stopped_by)
    writes = not command.config["fit"]["trainer"].get("fast_dev_run")
    return FitResult(
        output=output,
        report=command.report,
        metrics=_numbers(output / "metrics.csv") if writes else [],
        stopped_by=NAMES[command.stopped_by] if command.stopped_by is not None else None,
    )


def _words(
    config: Mapping[str, Any] | str | os.PathLike[str] | None, overrides: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the words of the command line that says the same."""
    if isinstance(config, Mapping):
        yield _settings(config)
    elif isinstance(config, str | os.PathLike):
        path = os.fspath(config)
        check_names(read_settings(path))
        yield f"--config={path}"
    elif config is not None:
        raise InputError(
            f"config: a {type(config).__name__} is no configuration; give a mapping, or the path "
            "of a YAML file"
        )
    for name in overrides:
        if not _OPTION.fullmatch(name) or name in _NOT_HERE:
            raise InputError(f"{name}: no such option; name one of `moezoo fit --help`")
    groups = {n: v for n, v in overrides.items() if "." not in n and isinstance(v, Mapping)}
    if groups:
        yield _settings(groups)
    for name, value in overrides.items():
        if name not in groups:
            yield f"--{name}={value if isinstance(value, str) else _written(name, value)}"


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the option that stands for a file with these settings."""
    check_names(_plain("config", settings))
    return f"--config={_written('config', settings)}"


def _written(name: str, value: Any) -> str:
    """Write a value in YAML, in one line; a mapping in braces."""
    text: str = yaml.dump(
        _plain(name, value),
        Dumper=_OneLine,
        default_flow_style=True,
        width=float("inf"),
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _OneLine(yaml.SafeDumper):
    """Quotes texts of several lines, and what our reader takes for a number where yaml does not."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    several = len(f"{text}.".splitlines()) > 1
    number = re.fullmatch(r"[-+.\d_eE]+", text) is not None
    style = '"' if several or number else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_OneLine.add_representer(str, _represent_text)


def _plain(name: str, value: Any) -> Any:
    """Return a value as YAML has it: mappings, lists, texts and numbers.

    Raises:
        InputError: it holds something else; names the key.
    """
    if isinstance(value, Mapping):
        place = "" if name == "config" else f"{name}."
        return {str(key): _plain(f"{place}{key}", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{number}]", inner) for number, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of numpy or torch
        return _plain(name, value.item())
    raise InputError(
        f"{name}: a {type(value).__name__} is no value of an option; give what a YAML file holds, "
        "such as a layer's class_path and init_args"
    )


def _numbers(path: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in read_metrics(path)]


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what a run changes for all of the process."""
    state, environment = get_random_state(), dict(os.environ)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}
    try:
        with quieted():
            yield
    finally:
        set_random_state(state)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for number, handler in handlers.items():
            if handler is not None:  # one that is not Python's cannot be put back
                signal.signal(number, handler)
