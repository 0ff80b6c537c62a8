"""``moezoo compare carving``: does it matter which neurons make an expert, also after training?

CMoE (Pei et al. 2025, arXiv:2502.04416) groups the neurons of a dense block by what activates them,
and routes by one neuron of each group. Here the same dense model is carved with that grouping and
with others, everything else being equal, and then each model is fine-tuned for a few steps on the
same tokens in the same order. The dense model is fine-tuned as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from moezoo.convert import CarveOptions
from moezoo.errors import InputError, check_choice, check_int, nearest
from moezoo_models.checkpoints.directory import CONFIG, existing, read_json
from moezoo_models.checkpoints.export import export
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.checkpoint import REPORT
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.study import carve_options
from moezoo_models.model.config import MoezooConfig
from moezoo_train.experiments.common.options import TextOptions
from moezoo_train.experiments.common.picture import Line, Panel, draw_lines, means_of
from moezoo_train.experiments.common.records import Figures, Task, run_all
from moezoo_train.experiments.common.report import write_report
from moezoo_train.experiments.common.short_run import fit, open_text, validate
from moezoo_train.experiments.common.statistics import mean
from moezoo_train.experiments.common.verdict import JudgedDifference, is_positive, paired, signed
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.precision import precision_here

STAGES = {"before": "carved, untrained", "after": "fine-tuned"}
DENSE = "dense"
_SET_HERE = ("shared", "active", "experts", "seed")
_PLAIN: dict[str, Any] = {
    "router": "ridge",
    "router_ridge": 1e-2,
    "refit_ridge": 1e-1,
    "follow": False,
    "budgets": "equal",
    "accept_loss": True,
    "sparsified": False,
}
"""Every layer saves as much, whatever the grouping; what is lost is tuned away afterwards."""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Options that all runs share; ``sha256`` is that of the dense model."""

    dense: Path
    sha256: str
    calibration: str | list[str]
    calibration_tokens: int
    max_steps: int
    precision: str
    text: TextOptions
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    def inputs(self) -> dict[str, Any]:
        """List what the figures depend on."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: asdict(values[name]) for name in ("text", "optimizer", "schedule")}
        data = open_text(self.text, 0).prepared.inputs
        return {**values, **parts, "dense": "", "data": data}


def compare_carving(
    source: str,
    groupings: dict[str, Any],
    ours: str = "cmoe",
    output: str = "runs/claims/carving",
    sizes: list[str] = ["S3A9E16", "S2A6E16", "S2A2E16"],  # noqa: B006 - never changed
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 16384,
    seeds: list[int] = [1, 2, 3],  # noqa: B006 - never changed
    max_steps: int = 100,
    precision: str = "32-true",
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> list[JudgedDifference]:
    """Carve a dense model with several groupings of neurons, and fine-tune each a little.

    All groupings of a seed see the same calibration text, and train on the same tokens in the same
    order. A run that is finished is not repeated. Writes table.md, results.json and losses.png.

    Args:
        source: directory of the dense model, of ours or of any family that carve reads.
        groupings: by name, options of moezoo carve (split, shared_by, router, refit, ...).
        ours: the grouping that is claimed to be better than each of the others.
        output: directory of the experiment.
        sizes: such as S3A3E8: 3 shared and 3 active of 8 parts.
        calibration: as for moezoo carve.
        calibration_tokens: as there.
        seeds: of calibration passages and draws, and of the order of the text; others than the
            dense model's training had.
        max_steps: optimizer steps of the fine-tuning.
        precision: as the trainer's, e.g. 32-true or bf16-mixed; auto is bf16-mixed on a GPU that
            has bf16, else 32-true.
        text: data_dir as the dense model's run left it, sequence_length, batch_size.
        optimizer: how parameters are updated.
        schedule: how the learning rate moves.

    Returns:
        Whether ours is better, for each size and other grouping, before and after fine-tuning.

    Raises:
        InputError: the source cannot be carved, or an option is invalid.
    """
    check_int("max_steps", max_steps)
    check_choice("ours", ours, groupings)
    if not sizes or not seeds or len(set(seeds)) < len(seeds):
        raise InputError("sizes, seeds: give at least one of each, and none twice")
    for seed in seeds:
        check_int("seeds", seed, minimum=0)
    folder = Path(output)
    dense = _stock(existing(Path(source)), folder)
    with open_source(dense) as model:
        sha256 = model.fingerprint()
        for name, options in groupings.items():
            _check(name, options, sizes, model.width)
    setting = _Setting(
        dense,
        sha256,
        calibration,
        calibration_tokens,
        max_steps,
        precision_here(precision),
        text,
        optimizer.here(),
        schedule,
    )
    quiet_lightning()
    console = Console(stderr=True)
    tasks = [
        Task(f"{DENSE}-{seed}", _inputs(setting, seed), partial(_dense, setting, seed))
        for seed in seeds
    ]
    for seed, size, name in itertools.product(seeds, sizes, groupings):
        inputs = {**_inputs(setting, seed), "size": size, "options": groupings[name]}
        measure = partial(_carved, setting, seed, size, groupings[name])
        tasks.append(Task(f"{size}-{name}-{seed}", inputs, measure))
    figures = run_all(folder / "runs", tasks, "after", console)
    study = _Study(figures, sizes, list(groupings), ours, seeds)
    verdicts = study.verdicts()
    write_report(
        folder,
        f"Groupings of a dense model's neurons, {max_steps} steps of fine-tuning",
        study.columns(),
        study.rows(),
        {"groupings": groupings, "runs": figures},
        verdicts=verdicts,
        pictures={"losses": study.figure()},
    )
    return verdicts


def _check(name: str, options: Any, sizes: Sequence[str], width: int) -> None:
    """Refuse unknown options of a carve, before anything is computed."""
    known = {f.name for f in dataclasses.fields(CarveOptions)} - set(_SET_HERE)
    if name == DENSE or not isinstance(options, Mapping):
        raise InputError(
            f"groupings.{name}: write a mapping, e.g. {{split: random}}, under a name that is not "
            f"'{DENSE}'"
        )
    for option in options:
        if option not in known:
            raise InputError(f"groupings.{name}.{option}: no such option{nearest(option, known)}")
    for size in sizes:
        try:
            dataclasses.replace(carve_options(size), **options).check(width)
        except InputError as error:
            raise InputError(f"groupings.{name} at {size}: {error}") from error


def _stock(source: Path, folder: Path) -> Path:
    """Return the dense model as stock transformers know it."""
    if read_json(source / CONFIG).get("model_type") != MoezooConfig.model_type:
        return source
    target = folder / DENSE
    if not target.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            export(source, target)
    return target


def _inputs(setting: _Setting, seed: int) -> dict[str, Any]:
    return {**setting.inputs(), "seed": seed}


def _dense(setting: _Setting, seed: int, place: Path) -> Figures:
    return _train(setting, seed, setting.dense, place)


def _carved(
    setting: _Setting, seed: int, size: str, options: Mapping[str, Any], place: Path
) -> Figures:
    start = place / "start"
    shape = carve_options(size)
    with contextlib.redirect_stdout(io.StringIO()):
        carve(
            setting.dense,
            start,
            shape.shared,
            shape.active,
            shape.experts,
            calibration=setting.calibration,
            calibration_tokens=setting.calibration_tokens,
            seed=seed,
            to="moezoo",
            **{**_PLAIN, **options},
        )
    layers = json.loads((start / REPORT).read_text(encoding="utf-8"))["extra"]["layers"].values()
    figures = _train(setting, seed, start, place)
    shutil.rmtree(start)
    return figures | {
        name: statistics.fmean(layer[name] for layer in layers)
        for name in ("overlap", "chance_overlap", "error")
    }


def _train(setting: _Setting, seed: int, start: Path, place: Path) -> Figures:
    """Validate, fine-tune, validate."""
    pl.seed_everything(seed, verbose=False)
    data = open_text(setting.text, seed)
    module = LanguageModel(
        data.vocab_size,
        initialize_from=str(start),
        optimizer=setting.optimizer,
        schedule=setting.schedule,
    )
    before, _ = validate(module, setting.text, setting.precision)
    report, _ = fit(module, data, place, setting.max_steps, setting.precision, Console(quiet=True))
    assert report.val_loss is not None
    return {"before": before, "after": report.val_loss, "seconds": report.train_seconds}


@dataclasses.dataclass(frozen=True)
class _Study:
    """All figures, and how they are shown."""

    figures: Mapping[str, Figures]
    sizes: Sequence[str]
    groupings: Sequence[str]
    ours: str
    seeds: Sequence[int]

    def of(self, figure: str, grouping: str, size: str = "") -> dict[int, float]:
        """Return a figure by seed."""
        stem = DENSE if grouping == DENSE else f"{size}-{grouping}"
        return {seed: self.figures[f"{stem}-{seed}"][figure] for seed in self.seeds}

    def differences(self, stage: str, grouping: str, size: str) -> list[float]:
        """Return by how much a grouping is worse than ours, by seed."""
        return paired(self.of(stage, self.ours, size), self.of(stage, grouping, size))

    def columns(self) -> list[str]:
        """Name the columns."""
        stages = [f">loss {stage}" for stage in STAGES]
        gaps = [f">{stage}: more than {self.ours}" for stage in STAGES]
        rest = [">router's overlap with the oracle", ">chance"]
        return ["size", "neurons active", "grouping", *stages, *gaps, *rest]

    def rows(self) -> list[list[str]]:
        """Lay the table out."""
        dense = [str(mean(list(self.of(stage, DENSE).values()))) for stage in STAGES]
        rows = [["", "100 %", DENSE, *dense, "", "", "", ""]]
        for size, grouping in itertools.product(self.sizes, self.groupings):
            cells = [str(mean(list(self.of(s, grouping, size).values()))) for s in STAGES]
            cells += ["" if grouping == self.ours else self._gap(s, grouping, size) for s in STAGES]
            chances = ("overlap", "chance_overlap")
            cells += [
                f"{statistics.fmean(self.of(name, grouping, size).values()):.3f}"
                for name in chances
            ]
            rows.append([size, f"{100 * _share(size):.0f} %", grouping, *cells])
        return rows

    def _gap(self, stage: str, grouping: str, size: str) -> str:
        found = mean(self.differences(stage, grouping, size))
        assert found is not None
        return signed(found)

    def verdicts(self) -> list[JudgedDifference]:
        """Judge ours against each of the others."""
        others = [grouping for grouping in self.groupings if grouping != self.ours]
        return [
            is_positive(
                f"{size}, {STAGES[stage]}: {self.ours} is better than {other}",
                self.differences(stage, other, size),
            )
            for stage, size, other in itertools.product(STAGES, self.sizes, others)
        ]

    def figure(self) -> Any:
        """Draw the losses before and after, a panel for each size."""
        panels = []
        for size in self.sizes:
            lines = [
                Line(name, [mean(list(self.of(s, name, size).values())) for s in STAGES])
                for name in (*self.groupings, DENSE)
            ]
            panels.append(Panel(f"{100 * _share(size):.0f} % of the neurons ({size})", lines))
        return draw_lines(
            panels,
            list(STAGES.values()),
            "validation loss (nats per token)",
            means_of(len(self.seeds)),
            grey=DENSE,
        )


def _share(size: str) -> float:
    shape = carve_options(size)
    return (shape.shared + shape.active) / shape.experts
