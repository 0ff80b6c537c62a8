"""``moezoo compare facts``: do memories learn facts faster than other layers of equal cost?

Memory layers (Berges et al. 2024, arXiv:2412.09764) are claimed to shine at factual questions. Here
models that differ in the layer of some blocks, at equal active FLOPs, read sentences that tie
made-up names to made-up values, the same tokens in the same order. Then they are asked for the
values. The more facts there are, the fewer times each is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moezoo.command.tables import count
from moezoo.errors import InputError, check_choice, check_int
from moezoo_train.data.prepare import prepare
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.picture import Line, Panel, draw_lines, means_of
from moezoo_train.experiments.common.records import Figures, Task, run_all
from moezoo_train.experiments.common.report import write_report
from moezoo_train.experiments.common.short_run import fit, open_text
from moezoo_train.experiments.common.statistics import Mean, mean
from moezoo_train.experiments.common.verdict import JudgedDifference, is_positive, paired
from moezoo_train.experiments.compare.execution import build
from moezoo_train.experiments.compare.runs import Run, plan
from moezoo_train.experiments.compare.settings import Experiment, parse_methods
from moezoo_train.experiments.made_up_facts import (
    NUM_WORDINGS,
    Fact,
    fact_documents,
    make_facts,
    recall,
    write_documents,
)
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.precision import precision_here

SENTENCE_TOKENS = 8
"""Fewer than any sentence has with a vocabulary of words' parts: the text must last for a run."""


def compare_facts(
    methods: dict[str, Any],
    claims: list[list[str]],
    facts: list[int] = [512, 2048, 8192],  # noqa: B006 - never changed
    values: int = 64,
    wordings: int = 1,
    asked: int = 1024,
    output: str = "runs/claims/facts",
    vocab_size: int = 384,
    sequence_length: int = 64,
    batch_size: int = 16,
    baseline: str = "dense_mlp",
    layers: str | int | list[int] = 1,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    max_steps: int = 300,
    tolerance: float = 0.05,
    precision: str = "32-true",
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> list[JudgedDifference]:
    """Train methods on made-up facts at equal active FLOPs, and ask them for the facts.

    A run that is finished is not repeated. Writes table.md, results.json and recall.png.

    Args:
        methods: rows of the table, as for moezoo compare.
        claims: pairs of rows, of which the first is claimed to recall more than the second.
        facts: numbers of facts; all runs read equally many tokens.
        values: different values of each of the four relations, one of which is right.
        wordings: ways in which each fact is told; it is asked for in the same.
        asked: facts that a model is asked for at the end, from the first on; all, if there are
            fewer.
        output: directory of the experiment.
        vocab_size: tokens of the tokenizer that is trained on the largest number of facts.
        sequence_length: tokens per window.
        batch_size: windows per optimizer step.
        baseline: method of the zoo whose FLOPs the others meet; blocks that a method does not take
            have it too.
        layers: blocks that get the method.
        seeds: of initial weights and the order of the text; the facts are the same.
        max_steps: optimizer steps of every run.
        tolerance: largest relative difference of a layer's FLOPs from the baseline's.
        precision: as the trainer's, e.g. 32-true or bf16-mixed; auto is bf16-mixed on a GPU that
            has bf16, else 32-true.
        model: the decoder around the layers.
        optimizer: how parameters are updated; the layers' own learning-rate multipliers hold.
        schedule: how the learning rate moves.

    Returns:
        Whether each claim holds, for each number of facts.

    Raises:
        InputError: an option is invalid.
    """
    rows = parse_methods(methods)
    for pair in claims:
        if len(pair) != 2:
            raise InputError(f"claims: {pair} is not two rows; write e.g. [memory_plus, dense_mlp]")
        for name in pair:
            check_choice("claims", name, rows)
    check_int("wordings", wordings, maximum=NUM_WORDINGS)
    check_int("asked", asked)
    if not facts or len(set(facts)) < len(facts):
        raise InputError("facts: give at least one number, and none twice")
    for number in facts:
        check_int("facts", number)
    everything = make_facts(max(facts), values=values)
    folder = Path(output)
    experiment = Experiment(
        methods=rows,
        baseline=baseline,
        layers=layers,
        ablation=False,
        seeds=tuple(seeds),
        max_steps=max_steps,
        tolerance=tolerance,
        model=model,
        text=TextOptions(
            max_bytes=None,
            vocab_size=vocab_size,
            val_fraction=0.02,
            sequence_length=sequence_length,
            batch_size=batch_size,
        ),
        optimizer=optimizer,
        schedule=schedule,
        precision=precision_here(precision),
    )
    plan(experiment)
    quiet_lightning()
    tasks = []
    for number in sorted(facts, reverse=True):
        told = everything[:number]
        first = folder / "data" / str(max(facts)) / "tokenizer"
        data = folder / "data" / str(number)
        inputs = _prepare(data, told, wordings, experiment, None if number == max(facts) else first)
        text = dataclasses.replace(experiment.text, source=str(data), data_dir=str(data))
        for run in plan(dataclasses.replace(experiment, text=text)):
            identity = {**run.identity(inputs), "asked": asked, "wordings": wordings}
            measure = partial(_run, run, told[:asked], wordings)
            tasks.append(Task(f"{number}-{run.folder}", identity, measure))
    tasks.sort(key=lambda task: str(task.name).rpartition("-")[2])
    figures = run_all(folder / "runs", tasks, "accuracy", Console(stderr=True))
    study = _Study(figures, list(rows), claims, sorted(facts), seeds)
    verdicts = study.verdicts()
    tokens = max_steps * batch_size * sequence_length
    write_report(
        folder,
        f"Facts recalled after {tokens:,} tokens",
        COLUMNS,
        study.rows(),
        {"methods": methods, "runs": figures},
        verdicts=verdicts,
        pictures={"recall": study.figure(tokens)},
    )
    return verdicts


def _prepare(
    data: Path, told: Sequence[Fact], wordings: int, experiment: Experiment, tokenizer: Path | None
) -> dict[str, Any]:
    """Write facts as text, as much as a run reads, and make tokens of it."""
    text = experiment.text
    wanted = experiment.max_steps * text.batch_size * text.sequence_length
    repeats = math.ceil(wanted / (len(told) * wordings * SENTENCE_TOKENS))
    data.mkdir(parents=True, exist_ok=True)
    write_documents(data / "facts.jsonl", fact_documents(told, range(wordings), repeats=repeats))
    return prepare(
        source=str(data / "facts.jsonl"),
        output=data,
        vocab_size=text.vocab_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
        val_fraction=text.val_fraction,
    ).inputs


def _run(run: Run, asked: Sequence[Fact], wordings: int, place: Path) -> Figures:
    """Train one model, and ask it."""
    experiment = run.experiment
    text = open_text(experiment.text, run.seed)
    module = build(run, text.vocab_size)
    silent = Console(quiet=True)
    report, _ = fit(module, text, place, experiment.max_steps, experiment.precision, silent)
    found = recall(module.model, text.tokenizer, asked, range(wordings))
    assert report.val_loss is not None
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "val_loss": report.val_loss,
        "total_parameters": report.total_parameters,
        "active_parameters": report.active_parameters,
        "flops_ratio": run.flops_ratio,
        "seconds": report.train_seconds,
    }


COLUMNS = (
    "facts",
    "method",
    ">recalled",
    ">loss of the values",
    ">loss of all text",
    ">parameters",
    ">active",
    ">FLOPs ÷ baseline",
)


@dataclass(frozen=True)
class _Study:
    """All figures, and how they are shown."""

    figures: Mapping[str, Figures]
    methods: Sequence[str]
    claims: Sequence[Sequence[str]]
    facts: Sequence[int]
    seeds: Sequence[int]

    def of(self, figure: str, number: int, method: str) -> dict[int, float]:
        """Return a figure by seed."""
        return {seed: self.figures[f"{number}-{method}-{seed}"][figure] for seed in self.seeds}

    def mean(self, figure: str, number: int, method: str) -> Mean:
        """Average a figure over the seeds."""
        found = mean(list(self.of(figure, number, method).values()))
        assert found is not None
        return found

    def rows(self) -> list[list[str]]:
        """Lay the table out."""
        means = ("accuracy", "loss", "val_loss")
        counts = ("total_parameters", "active_parameters")
        return [
            [
                f"{number:,}",
                method,
                *(str(self.mean(figure, number, method)) for figure in means),
                *(count(round(self.mean(figure, number, method).value)) for figure in counts),
                f"{self.mean('flops_ratio', number, method).value:.3f}",
            ]
            for number, method in itertools.product(self.facts, self.methods)
        ]

    def verdicts(self) -> list[JudgedDifference]:
        """Judge the claims by the share of facts recalled."""
        return [
            is_positive(
                f"{number:,} facts: {ours} recalls more than {other}",
                paired(self.of("accuracy", number, other), self.of("accuracy", number, ours)),
            )
            for number, (ours, other) in itertools.product(self.facts, self.claims)
        ]

    def figure(self, tokens: int) -> Any:
        """Draw the share recalled, and the loss of the values, over the number of facts."""
        panels = [
            Panel(
                title,
                [
                    Line(method, [self.mean(figure, number, method) for number in self.facts])
                    for method in self.methods
                ],
            )
            for figure, title in (
                ("accuracy", "share recalled"),
                ("loss", "nats per token of a value"),
            )
        ]
        return draw_lines(
            panels,
            [f"{number:,} facts" for number in self.facts],
            "",
            f"{tokens:,} tokens each. {means_of(len(self.seeds))}",
            grey=self.methods[0],
        )
