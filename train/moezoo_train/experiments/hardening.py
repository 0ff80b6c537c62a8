"""``moezoo compare hardening``: is a hardened tree's hard output as good as its soft one?

A fast feedforward layer (Belcak and Wattenhofer 2023, arXiv:2308.14711) learns as a soft mixture of
its leaves and is evaluated by a single one. A loss on the entropy of its decisions is to make the
two the same. Here trees are trained with that loss at several strengths, and the same weights are
validated soft and hard. Trees of all depths are as wide as the dense block while training, and
depth 0 is that block.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from moezoo import FastFeedForward
from moezoo.errors import InputError, check_int, check_number
from moezoo.feed_forward import FeedForward
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.picture import Line, Panel, draw_lines, means_of
from moezoo_train.experiments.common.records import Figures, Task, run_all
from moezoo_train.experiments.common.report import write_report
from moezoo_train.experiments.common.short_run import fit, open_text, prepare_text, validate
from moezoo_train.experiments.common.statistics import Mean, mean
from moezoo_train.experiments.common.verdict import JudgedDifference, is_small, paired, signed
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.precision import precision_here

MODES = ("soft", "hard")
DENSE = "dense"


def compare_hardening(
    trees: dict[str, Any],
    depths: list[int] = [2, 3, 4],  # noqa: B006 - never changed
    margin: float = 0.01,
    output: str = "runs/claims/hardening",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    max_steps: int = 300,
    precision: str = "32-true",
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> list[JudgedDifference]:
    """Train trees of decisions with several hardening losses, and validate them soft and hard.

    A run that is finished is not repeated. Writes table.md, results.json and losses.png.

    Args:
        trees: by name, arguments of moezoo.FastFeedForward (hardening, hardening_reduction, ...).
        depths: levels of the trees.
        margin: the difference between soft and hard loss that does not count, in nats per token.
        output: directory of the experiment.
        seeds: of initial weights and the order of the text.
        max_steps: optimizer steps of every run.
        precision: as the trainer's, e.g. 32-true or bf16-mixed; auto is bf16-mixed on a GPU that
            has bf16, else 32-true.
        model: the decoder around the layers.
        text: the training text.
        optimizer: how parameters are updated.
        schedule: how the learning rate moves.

    Returns:
        Whether hard and soft losses are the same, for each depth and hardening.

    Raises:
        InputError: an option is invalid.
    """
    check_int("max_steps", max_steps)
    check_number("margin", margin)
    if not depths or not seeds or len(set(seeds)) < len(seeds):
        raise InputError("depths, seeds: give at least one of each, and none twice")
    for seed in seeds:
        check_int("seeds", seed, minimum=0)
    for name, arguments in trees.items():
        _check(name, arguments, model.d_model, depths)
    data = prepare_text(text)
    quiet_lightning()
    setting = _Setting(
        max_steps, precision_here(precision), model, text, optimizer.here(), schedule
    )
    tasks = []
    for seed in seeds:
        contenders = {DENSE: {"depth": 0, "hardening": 0.0}} | {
            f"{name}-{depth}": {**trees[name], "depth": depth}
            for depth, name in itertools.product(depths, trees)
        }
        for name, arguments in contenders.items():
            inputs = {**asdict(setting), "data": data, "tree": arguments, "seed": seed}
            measure = partial(_run, setting, arguments, seed)
            tasks.append(Task(f"{name}-{seed}", inputs, measure))
    figures = run_all(Path(output) / "runs", tasks, "hard", Console(stderr=True))
    study = _Study(figures, list(trees), depths, seeds, margin)
    verdicts = study.verdicts()
    write_report(
        Path(output),
        f"Trees of decisions, soft and hard, after {max_steps} steps",
        COLUMNS,
        study.rows(),
        {"trees": trees, "margin": margin, "runs": figures},
        verdicts=verdicts,
        pictures={"losses": study.figure()},
    )
    return verdicts


def _check(name: str, arguments: Any, d_model: int, depths: Sequence[int]) -> None:
    """Build a tree's layer, so that a mistake shows before anything is trained."""
    if not isinstance(arguments, Mapping) or "depth" in arguments:
        raise InputError(f"trees.{name}: write a mapping without depth, e.g. {{hardening: 0.1}}")
    try:
        for depth in depths:
            _layer({**arguments, "depth": depth}, d_model)
    except InputError as error:
        raise InputError(f"trees.{name}.{error}") from error


def _layer(arguments: Mapping[str, Any], d_model: int) -> FeedForward:
    return FeedForward.from_config(
        {"class_path": "moezoo.FastFeedForward", "init_args": dict(arguments)}, d_model=d_model
    )


@dataclass(frozen=True)
class _Setting:
    """Options that all runs share."""

    max_steps: int
    precision: str
    model: ModelOptions
    text: TextOptions
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


def _run(setting: _Setting, arguments: Mapping[str, Any], seed: int, place: Path) -> Figures:
    """Train one model, and validate it in both modes."""
    pl.seed_everything(seed, verbose=False)
    data = open_text(setting.text, seed)
    module = LanguageModel(
        data.vocab_size,
        d_model=setting.model.d_model,
        num_layers=setting.model.num_layers,
        num_heads=setting.model.num_heads,
        max_length=setting.text.sequence_length,
        ffn=partial(_layer, arguments),
        optimizer=setting.optimizer,
        schedule=setting.schedule,
    )
    report, _ = fit(module, data, place, setting.max_steps, setting.precision, Console(quiet=True))
    figures: Figures = {"seconds": report.train_seconds}
    layers = [layer for layer in ffn_layers(module.model) if isinstance(layer, FastFeedForward)]
    for mode in MODES:
        for layer in layers:
            layer.hard = mode == "hard"
        figures[mode], loads = validate(module, setting.text, setting.precision)
        if mode == "soft" and arguments["depth"]:
            entropies = [load.node_entropy for load in loads if load.node_entropy is not None]
            busiest = [load.max_over_mean for load in loads if load.max_over_mean is not None]
            figures["entropy"] = statistics.fmean(entropies)
            figures["busiest"] = max(busiest) / 2 ** arguments["depth"]
    return figures


COLUMNS = (
    "depth",
    "hardening",
    ">soft loss",
    ">hard loss",
    ">hard − soft",
    ">hard − dense",
    ">decision entropy (nats)",
    ">tokens at the busiest leaf (worst block)",
)


@dataclass(frozen=True)
class _Study:
    """All figures, and how they are shown."""

    figures: Mapping[str, Figures]
    trees: Sequence[str]
    depths: Sequence[int]
    seeds: Sequence[int]
    margin: float

    def of(self, figure: str, contender: str) -> dict[int, float]:
        """Return a figure by seed."""
        return {seed: self.figures[f"{contender}-{seed}"][figure] for seed in self.seeds}

    def gap(self, contender: str) -> list[float]:
        """Return what hard decisions cost, by seed."""
        return paired(self.of("soft", contender), self.of("hard", contender))

    def rows(self) -> list[list[str]]:
        """Lay the table out."""
        dense = self.of("hard", DENSE)
        rows = [["0", DENSE, "", str(_mean(dense)), "", "", "", ""]]
        for depth, name in itertools.product(self.depths, self.trees):
            contender = f"{name}-{depth}"
            hard = self.of("hard", contender)
            rows.append(
                [
                    str(depth),
                    name,
                    str(_mean(self.of("soft", contender))),
                    str(_mean(hard)),
                    signed(_sure(self.gap(contender))),
                    signed(_sure(paired(dense, hard))),
                    f"{_mean(self.of('entropy', contender)).value:.3f}",
                    f"{100 * _mean(self.of('busiest', contender)).value:.0f} %",
                ]
            )
        return rows

    def verdicts(self) -> list[JudgedDifference]:
        """Judge every depth and hardening."""
        return [
            is_small(
                f"depth {depth}, hardening {name}: hard is soft, within {self.margin:g} nats",
                self.gap(f"{name}-{depth}"),
                self.margin,
            )
            for depth, name in itertools.product(self.depths, self.trees)
        ]

    def figure(self) -> Any:
        """Draw soft and hard losses, a panel for each depth."""
        dense = _mean(self.of("hard", DENSE))
        panels = []
        for depth in self.depths:
            lines = [
                Line(name, [_mean(self.of(mode, f"{name}-{depth}")) for mode in MODES])
                for name in self.trees
            ]
            panels.append(Panel(f"depth {depth}", [*lines, Line(DENSE, [dense] * len(MODES))]))
        return draw_lines(
            panels,
            [f"validated {mode}" for mode in MODES],
            "validation loss (nats per token)",
            f"The same weights in both modes. {means_of(len(self.seeds))}",
            grey=DENSE,
        )


def _mean(by_seed: Mapping[int, float]) -> Mean:
    return _sure(list(by_seed.values()))


def _sure(values: Sequence[float]) -> Mean:
    found = mean(values)
    assert found is not None
    return found
