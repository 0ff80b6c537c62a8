"""One training run of a comparison, and its result on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from transformers import PreTrainedModel

from moezoo.command.messages import one_line
from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward
from moezoo.random_routing import RandomRouting
from moezoo.router_input import FFN_INPUT
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_train.experiments.common.records import RESULT, fingerprint, read_record, write_record
from moezoo_train.experiments.common.short_run import fit, open_text
from moezoo_train.experiments.compare.peak_memory import PeakMemory
from moezoo_train.experiments.compare.row_model import model_arguments
from moezoo_train.experiments.compare.runs import Run
from moezoo_train.experiments.compare.settings import find_method
from moezoo_train.measure.expert_load import ExpertLoad
from moezoo_train.measure.report import Report
from moezoo_train.run.module import FFNRule, LanguageModel

MODEL = "model"
"""Folder of the trained model, where another run follows it."""


@dataclass(frozen=True)
class RunResult:
    """The outcome of one run, as its ``result.json`` holds it.

    Attributes:
        run: the run's folder.
        hash: of everything the numbers depend on.
        identity: that in words.
        failure: why there are no numbers, in one line; None if there are.
        val_loss: nats per token over all validation tokens, at the end.
        bits_per_byte: the same per byte of text.
        train_loss: nats per token, mean over the last twentieth of the run.
        tokens: trained on.
        seconds: that took, validation not included.
        total_parameters: of the model.
        active_parameters: those that one token touches.
        evenness: entropy of the shares of experts, slots or neurons in the assignments of the
            validation text, over its maximum, mean over the layers that count them; 1 is even.
            None if none does.
        busiest: load of the busiest over the mean, the largest among these layers.
        usage: share of the slots that had any weight, mean over batches and layers.
        unevenness: divergence of their weights from uniform in nats, likewise.
        peak_memory: bytes while the run trains and validates, as
            :class:`moezoo_train.experiments.compare.peak_memory.PeakMemory` measures them; None if
            it is not known.
        environment: machine and versions.
    """

    run: str
    hash: str
    identity: dict[str, Any]
    failure: str | None = None
    val_loss: float = float("nan")
    bits_per_byte: float = float("nan")
    train_loss: float = float("nan")
    tokens: int = 0
    seconds: float = 0.0
    total_parameters: int = 0
    active_parameters: int = 0
    evenness: float | None = None
    busiest: float | None = None
    usage: float | None = None
    unevenness: float | None = None
    peak_memory: int | None = None
    environment: Mapping[str, Any] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


def finished(output: Path, run: Run, data: dict[str, Any]) -> RunResult | None:
    """Return the result of a run that was made with the same configuration, if it succeeded."""
    record = read_record(output / run.folder / RESULT, run.identity(data))
    if record is None:
        return None
    if run.is_followed and not (output / run.folder / MODEL).exists():
        return None  # it was trained when no other run wanted its embeddings
    try:
        result = RunResult(**record)
    except TypeError:
        return None  # not by this version
    return result if result.failure is None else None


def execute(output: Path, run: Run, data: dict[str, Any], console: Console) -> RunResult:
    """Train one run and write its ``result.json``, also if it fails.

    A bug is a failure of this run only; ``MOEZOO_TRACEBACK=1`` raises it instead.
    """
    folder = output / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    identity = run.identity(data)
    common: dict[str, Any] = {
        "run": run.folder,
        "hash": fingerprint(identity),
        "identity": identity,
    }
    try:
        with PeakMemory() as memory:
            report, loads = train(run, folder, console)
        result = RunResult(**common, **_numbers(report, loads), peak_memory=memory.peak)
    except Exception as error:
        if os.environ.get("MOEZOO_TRACEBACK"):
            raise
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        result = RunResult(**common, failure=one_line(f"{kind}{error}"))
    write_record(folder / RESULT, **asdict(result))
    return result


def train(run: Run, folder: Path, console: Console) -> tuple[Report, list[ExpertLoad]]:
    """Train one run, logging to its ``metrics.csv``; return report and validation load."""
    experiment = run.experiment
    text = open_text(experiment.text, run.seed)
    module = build(run, text.vocab_size)
    if run.follows:
        module.hash_embeddings_from = str(folder.parent / run.follows.folder / MODEL)
    outcome = fit(module, text, folder, experiment.max_steps, experiment.precision, console)
    if run.is_followed:
        save_checkpoint(folder / MODEL, module.model, text.tokenizer)
    return outcome


def build(run: Run, vocab_size: int) -> LanguageModel:
    """Build the model of a run; with random routing it begins with the same weights as without."""
    experiment, size = run.experiment, run.experiment.model
    pl.seed_everything(run.seed, verbose=False)
    baseline = find_method("baseline", experiment.baseline)

    def layer(d_model: int) -> FeedForward:
        return FeedForward.from_config(run.ffn, d_model=d_model)

    module = LanguageModel(
        vocab_size=vocab_size,
        d_model=size.d_model,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        max_length=experiment.text.sequence_length,
        ffn=baseline.build,
        router_input=baseline.router_input,
        ffn_rules=[FFNRule(list(run.layers), layer, run.router_input)],
        memory=None if run.memory is None else {"layers": list(run.layers), **run.memory},
        allow_non_causal=True,
        optimizer=experiment.optimizer_of(run.row),
        schedule=experiment.schedule,
        **model_arguments(run.model),
    )
    if run.random:
        randomize(module.model, run.layers, run.seed)
    return module


def randomize(model: PreTrainedModel, layers: tuple[int, ...], seed: int) -> None:
    """Make the routing of chosen blocks random, by noise of their input's scale.

    Where the router reads the residual stream, whose scale grows with training, it is noise of unit
    variance: the router's weights learn to do with that.
    """
    blocks: Any = model.model.layers
    for index in layers:
        block = blocks[index]
        noise_seed = seed * len(blocks) + index
        norm = block.norm_at(2) if block.router_input == FFN_INPUT else None
        block.mlp = RandomRouting(block.mlp, norm, noise_seed)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _numbers(report: Report, loads: list[ExpertLoad]) -> dict[str, Any]:
    busiest = [load.max_over_mean for load in loads if load.max_over_mean is not None]
    if report.val_loss is None or report.val_bits_per_byte is None:
        raise InputError(
            "max_steps: there is no validation loss, as the run ended before its last step; run "
            "this again"
        )
    return {
        "val_loss": report.val_loss,
        "bits_per_byte": report.val_bits_per_byte,
        "train_loss": report.train_loss,
        "tokens": report.tokens,
        "seconds": report.train_seconds,
        "total_parameters": report.total_parameters,
        "active_parameters": report.active_parameters,
        "evenness": _mean(load.entropy for load in loads),
        "busiest": max(busiest, default=None),
        "usage": _mean(load.usage for load in loads),
        "unevenness": _mean(load.unevenness for load in loads),
        "environment": report.environment,
    }
