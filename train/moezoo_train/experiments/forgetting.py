"""``moezoo compare forgetting``: what does it cost old knowledge to learn new facts?

Lin et al. 2025 (arXiv:2510.15103) teach a language model with memory layers new facts and find that
training few rows of the memory forgets far less than training adapters or everything. Here a model
learns a text and invented facts inside it; then it is taught other facts by each method, at several
learning rates, and asked for both in wordings that the new facts were not taught in.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from transformers import PreTrainedModel

import moezoo
from moezoo.errors import InputError, check_int, going_on
from moezoo_models.checkpoints.locks import writing
from moezoo_models.evaluation.perplexity import evaluate_text
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.data.prepare import prepare
from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.records import RESULT, read_record, write_record
from moezoo_train.experiments.common.short_run import fit, open_text
from moezoo_train.experiments.forgetting_report import TeachingResult, report
from moezoo_train.experiments.made_up_facts import (
    NUM_WORDINGS,
    Fact,
    fact_documents,
    make_facts,
    recall,
    tie_anew,
    write_documents,
)
from moezoo_train.finetune.background import inspect_background
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.finetune.neurons import NeuronOptions
from moezoo_train.finetune.sparse_memory import SparseMemoryOptions
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import FFNRule, LanguageModel

FORMAT = 1
"""Raised when the same configuration would give other numbers; results of others do not count."""


@dataclass(frozen=True)
class FactOptions:
    """Which facts are told, and how.

    Attributes:
        old: facts in the text that the model is trained on first, in all wordings.
        old_repeats: how often each is told in each wording there.
        new: facts that it is taught then; each seed ties their subjects to other values.
        values: values of each relation: a guess is right once in so many times.
        taught: wordings in which the new facts are taught, out of 0 … 5.
        asked: wordings in which all facts are asked for.
        seed: chooses all of them.
    """

    old: int = 200
    old_repeats: int = 10
    new: int = 100
    values: int = 32
    taught: tuple[int, ...] = (0, 1, 2, 3)
    asked: tuple[int, ...] = (4, 5)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("old", "old_repeats", "new"):
            check_int(f"facts.{name}", getattr(self, name))
        for name in ("taught", "asked"):
            wordings = getattr(self, name)
            if not wordings or not set(wordings) <= set(range(NUM_WORDINGS)):
                raise InputError(
                    f"facts.{name}: {list(wordings)} are not wordings; name some of 0 to "
                    f"{NUM_WORDINGS - 1}"
                )


@dataclass(frozen=True)
class BaseOptions:
    """The model that is taught: a decoder with dense blocks, and Memory+ in some.

    Attributes:
        memory: arguments of MemoryPlus.
        layers: blocks that have it.
        max_steps: optimizer steps of its training.
        optimizer: how it is trained.
        schedule: how its learning rate moves.
    """

    memory: dict[str, Any]
    layers: list[int]
    max_steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True)
class Teaching:
    """A way to teach new facts: of everything, unless it is said of what.

    Attributes:
        rates: learning rates, each of which is tried.
        optimizer: how it is trained; its learning rate does not count.
        rows: train so many rows of each table of values, and nothing else.
        background: whether rows that the text before reads much are left alone.
        lora: train adapters.
        neurons: train slices of some neurons of the dense blocks.
    """

    rates: list[float]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rows: int | None = None
    background: bool = True
    lora: LoRAOptions | None = None
    neurons: NeuronOptions | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise InputError("methods: one has no rates; give e.g. [1.0e-4, 1.0e-3]")


def compare_forgetting(
    methods: dict[str, Teaching],
    base: BaseOptions,
    output: str = "runs/forgetting",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    max_steps: int = 150,
    sequence_length: int = 64,
    batch_size: int = 8,
    background_batches: int = 1000,
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    facts: FactOptions = FactOptions(),
    schedule: ScheduleConfig = ScheduleConfig("constant", warmup_steps=0),  # noqa: B008 - frozen
) -> list[TeachingResult]:
    """Teach a small Memory+ model new facts in several ways, and measure what it forgets.

    The model is trained once. Each method then begins with it at each learning rate, with each
    seed's own new facts. Written are table.md, results.json and forgetting.png. A run that is
    finished is not repeated: interrupt it, add methods or seeds, and run the same command again.

    Args:
        methods: ways to teach, by name.
        base: the model that is taught.
        output: directory; gets a folder for each run.
        seeds: each chooses the values of the new facts, and their order.
        max_steps: optimizer steps of teaching.
        sequence_length: tokens of a window in teaching.
        batch_size: windows of a step in teaching.
        background_batches: of the text before, for methods that ask what it reads.
        model: the decoder around the layers.
        text: to train on first, beside the old facts; val_fraction of it is held out.
        facts: old and new ones.
        schedule: how the learning rate moves in teaching; those of tables do not.

    Returns:
        What is written, the model before teaching first.

    Raises:
        InputError: an option is out of range.
    """
    check_int("max_steps", max_steps)
    if not seeds:
        raise InputError("seeds: there is none; give e.g. [0, 1, 2]")
    known = make_facts(facts.old + facts.new, facts.seed, facts.values)
    study = _Study(Path(output), model, text, base, facts, known[: facts.old])
    quiet_lightning()
    with writing(output), going_on("the same command keeps what is finished"):
        before = study.train_base()
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        study.count_background(background_batches, sizes)
        outcomes = []
        for seed in seeds:
            new = tie_anew(known[facts.old :], seed)
            outcomes.append(study.measure_base(before, seed, new))
            data = study.prepare_facts(seed, new, sizes)
            for name, teaching in methods.items():
                for rate in teaching.rates:
                    run = _Run(name, teaching, rate, seed, max_steps, schedule)
                    outcomes.append(study.teach(run, data, new))
        report(Path(output), outcomes, facts.taught, facts.asked)
    return outcomes


@dataclass(frozen=True)
class _Run:
    """One teaching."""

    method: str
    teaching: Teaching
    rate: float
    seed: int
    max_steps: int
    schedule: ScheduleConfig

    @property
    def folder(self) -> str:
        return f"{self.method}-{self.rate:g}-{self.seed}".replace(" ", "_").replace(",", "")

    def identity(self) -> dict[str, Any]:
        """List what its numbers depend on: not what else is tried."""
        described = asdict(self)
        del described["teaching"]["rates"]
        if self.teaching.neurons is None:
            del described["teaching"]["neurons"]  # results from before there were any still hold
        described["teaching"]["optimizer"] = asdict(self.teaching.optimizer.here())
        return described


class _Study:
    """The text, the model and the facts that all runs of a comparison share."""

    def __init__(
        self,
        folder: Path,
        model: ModelOptions,
        text: TextOptions,
        base: BaseOptions,
        facts: FactOptions,
        old: list[Fact],
    ) -> None:
        self.folder = folder
        self.model = model
        self.text = text
        self.base = base
        self.facts = facts
        self.old = old
        self.console = Console(stderr=True)
        self.background = folder / "background.safetensors"
        self.identity: dict[str, Any] = {}
        self.held_out = ""

    def train_base(self) -> Path:
        """Train the model that is taught, unless that has been done; return its directory."""
        documents, self.held_out = self._documents()
        source = self.folder / "text.jsonl"
        write_documents(source, self._with_old_facts(documents))
        data = prepare(
            source=str(source), output=self.text.data_dir, vocab_size=self.text.vocab_size
        )
        self.identity = {
            "format": FORMAT,
            "moezoo": moezoo.__version__,
            "torch": torch.__version__,
            "data": data.inputs,
            "text": asdict(self.text),
            "model": asdict(self.model),
            "base": asdict(self.base) | {"optimizer": asdict(self.base.optimizer.here())},
            "facts": asdict(self.facts),
        }
        directory = self.folder / "base"
        if read_record(directory / RESULT, self.identity):
            return directory / "model"
        shutil.rmtree(directory, ignore_errors=True)
        pl.seed_everything(0, verbose=False)
        module = LanguageModel(
            data.vocab_size,
            d_model=self.model.d_model,
            num_layers=self.model.num_layers,
            num_heads=self.model.num_heads,
            max_length=self.text.sequence_length,
            ffn_rules=[FFNRule(self.base.layers, partial(moezoo.MemoryPlus, **self.base.memory))],
            optimizer=self.base.optimizer,
            schedule=self.base.schedule,
        )
        words = open_text(self.text, 0)
        trained, _ = fit(module, words, directory, self.base.max_steps, "32-true", self.console)
        module.save(directory / "model", words.tokenizer)
        write_record(directory / RESULT, self.identity, report=asdict(trained))
        self._say(f"trained the model: val loss {trained.val_loss:.3f}")
        return directory / "model"

    def _documents(self) -> tuple[list[str], str]:
        """Return the text to train on, and in one piece the text that is held out."""
        kept: list[str] = []
        held_out: list[str] = []
        size = 0
        every = max(2, round(1 / self.text.val_fraction))
        for number, document in enumerate(open_corpus(self.text.source).documents()):
            (kept if number % every else held_out).append(document)
            size += len(document.encode())
            if self.text.max_bytes is not None and size >= self.text.max_bytes:
                break
        return kept, "\n".join(held_out)

    def _with_old_facts(self, documents: list[str]) -> Iterator[str]:
        yield from documents
        wordings, repeats = range(NUM_WORDINGS), self.facts.old_repeats
        yield from fact_documents(self.old, wordings, self.facts.seed, repeats)

    def count_background(self, batches: int, sizes: dict[str, Any]) -> None:
        """See which rows the text before reads, unless that has been done."""
        self.identity |= {"background": batches, **sizes}
        done = self.folder / "background.json"
        if self.background.is_file() and read_record(done, self.identity):
            return
        start = self.folder / "base" / "model"
        inspect_background(start, self.text.data_dir, self.background, batches, **sizes)
        write_record(done, self.identity)

    def prepare_facts(self, seed: int, new: list[Fact], sizes: dict[str, Any]) -> TextOptions:
        """Turn the facts of a seed into text to train on."""
        place = self.folder / "facts" / str(seed)
        # Told four times, so that the document that validation takes away leaves each fact told.
        write_documents(place / "facts.jsonl", fact_documents(new, self.facts.taught, seed, 4))
        start = str(self.folder / "base" / "model")
        prepare(str(place / "facts.jsonl"), place / "data", tokenizer=start, val_fraction=0.001)
        return TextOptions(data_dir=str(place / "data"), **sizes)

    def measure_base(self, directory: Path, seed: int, new: list[Fact]) -> TeachingResult:
        """Ask the model before it is taught."""
        module = LanguageModel(self._vocabulary(), initialize_from=str(directory))
        words = open_text(self.text, 0).tokenizer
        return TeachingResult("before", 0.0, seed, **self._measure(module.model, words, new))

    def teach(self, run: _Run, text: TextOptions, new: list[Fact]) -> TeachingResult:
        """Teach the model and ask it, unless that has been done."""
        folder = self.folder / "runs" / run.folder
        identity = self.identity | run.identity()
        if found := read_record(folder / RESULT, identity):
            return TeachingResult(**found["outcome"])
        shutil.rmtree(folder, ignore_errors=True)
        pl.seed_everything(run.seed, verbose=False)
        data = open_text(text, run.seed)
        module = self._module(run)
        trained, _ = fit(module, data, folder, run.max_steps, "32-true", self.console)
        measured = self._measure(module.model, data.tokenizer, new)
        outcome = TeachingResult(
            run.method, run.rate, run.seed, **measured, seconds=trained.train_seconds
        )
        write_record(folder / RESULT, identity, outcome=asdict(outcome))
        self._say(
            f"{run.method}, rate {run.rate:g}, seed {run.seed}: new facts {outcome.new_facts:.0%}, "
            f"old facts {outcome.old_facts:.0%}, text loss {outcome.text_loss:.3f}"
        )
        return outcome

    def _module(self, run: _Run) -> LanguageModel:
        teaching = run.teaching
        settings = asdict(teaching.optimizer) | {"lr": run.rate}
        sparse = None
        if teaching.rows is not None:
            background = str(self.background) if teaching.background else None
            sparse = SparseMemoryOptions(teaching.rows, background)
        return LanguageModel(
            self._vocabulary(),
            initialize_from=str(self.folder / "base" / "model"),
            lora=teaching.lora,
            neurons=teaching.neurons,
            sparse_memory=sparse,
            optimizer=OptimizerConfig(**settings),
            schedule=run.schedule,
        )

    def _vocabulary(self) -> int:
        return open_text(self.text, 0).vocab_size

    def _measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, new: list[Fact]
    ) -> dict[str, float]:
        length = self.text.sequence_length
        words = evaluate_text(
            model,
            tokenizer,
            self.held_out,
            sequence_length=length,
            stride=length,
            batch_size=16,
        )
        asked = self.facts.asked
        return {
            "text_loss": words.loss,
            "old_facts": recall(model, tokenizer, self.old, asked).accuracy,
            "new_facts": recall(model, tokenizer, new, asked).accuracy,
            "new_taught": recall(model, tokenizer, new, self.facts.taught).accuracy,
        }

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
