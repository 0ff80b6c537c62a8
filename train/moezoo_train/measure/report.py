"""The report of a run: a table, ``report.json``, ``loss.png`` and ``sample.txt``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from moezoo.routing.losses import alone
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.devices import pick_device
from moezoo_models.generate import continue_text, prompt_ids
from moezoo_train.measure.environment import environment
from moezoo_train.measure.expert_load import ExpertLoad
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.metrics import TrainingMetrics
from moezoo_train.measure.throughput import count_parameters, count_trained
from moezoo_train.measure.writing import save_figure, write_json, write_text

if TYPE_CHECKING:
    from moezoo_train.trained import Measured

AVERAGED = 0.05
"""Last part of the logged steps that the reported training loss averages over."""


@dataclass(frozen=True)
class Report:
    """The outcome of a run.

    Attributes:
        steps: optimizer steps.
        tokens: trained on, over all ranks.
        train_loss: nats per token, mean over the last twentieth of the run.
        val_loss: nats per token over all validation tokens, at the last validation.
        val_perplexity: its exponential.
        val_bits_per_byte: the same loss per byte of text, comparable between tokenizers.
        tokens_per_second: over the whole run, validation not included.
        train_seconds: that those took.
        mfu: model FLOPs utilisation over the last logged steps.
        peak_flops: the device's peak in FLOP/s, and how it is known.
        total_parameters: of the model, without adapters or slices of neurons added to it.
        active_parameters: those of them that one token touches.
        trained_parameters: numbers that are trained: the whole model, or adapters, slices, tables.
        skipped_steps: steps whose loss or gradient was not finite, or leapt.
        expert_load: of each layer that routes, over the last logged steps.
        environment: machine and versions.
        sources: of several texts, what was trained on of each: path, weight, windows, tokens, and
            how often that goes through it (epochs).
    """

    steps: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    val_perplexity: float | None
    val_bits_per_byte: float | None
    tokens_per_second: float
    train_seconds: float
    mfu: float
    peak_flops: tuple[float, str]
    total_parameters: int
    active_parameters: int
    trained_parameters: int
    skipped_steps: int
    expert_load: list[ExpertLoad]
    environment: dict[str, Any]
    sources: list[dict[str, Any]] = field(default_factory=list)


def write_report(
    output: Path,
    trainer: Trainer,
    module: Measured,
    *,
    prompt: str = "",
    sample_tokens: int = 200,
    console: Console | None = None,
) -> Report:
    """Write all of it into a run's directory, and print the table and the sample.

    Args:
        output: the run's directory, with ``metrics.csv`` and, for the sample, ``model/``.
        trainer: after ``fit``.
        module: the module that it trained.
        prompt: begins the sample.
        sample_tokens: length of the sample in tokens; 0 for none.
        console: where to print; default: standard output.
    """
    console = console or Console()
    rows = read_metrics(output / "metrics.csv")
    report = collect(trainer, module, rows)
    write_json(output / "report.json", finite_or_null(asdict(report)), allow_nan=False)
    if _series(rows, "train/loss")[0]:
        draw_losses(output / "loss.png", rows, title=output.name)
    console.print(table(report, title=str(output)))
    if sample_tokens and (output / "model").is_dir():
        text = sample(output / "model", prompt, sample_tokens)
        write_text(output / "sample.txt", text)
        console.rule("sample")
        console.print(text, markup=False, highlight=False)
        console.rule()
    return report


def finite_or_null(value: Any) -> Any:
    """Return what JSON can hold: null for what is not finite, as the loss of a diverged run."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect(trainer: Trainer, module: Measured, rows: list[dict[str, str]]) -> Report:
    """Gather the figures of a finished run from its trainer and its ``metrics.csv``."""
    metrics = next(c for c in _callbacks(trainer) if isinstance(c, TrainingMetrics))
    _, losses = _series(rows, "train/loss")
    losses = losses[-max(1, round(AVERAGED * len(losses))) :]
    last = next((row for row in reversed(rows) if "val/loss" in row), {})
    validation = {
        name: float(last[f"val/{name}"]) if f"val/{name}" in last else None
        for name in ("loss", "perplexity", "bits_per_byte")
    }
    total, active = count_parameters(module.model)
    return Report(
        steps=trainer.global_step,
        tokens=metrics.tokens,
        train_loss=sum(losses) / len(losses) if losses else None,
        val_loss=validation["loss"],
        val_perplexity=validation["perplexity"],
        val_bits_per_byte=validation["bits_per_byte"],
        tokens_per_second=metrics.tokens / metrics.seconds if metrics.seconds else 0.0,
        train_seconds=metrics.seconds,
        mfu=metrics.mfu,
        peak_flops=metrics.peak,
        total_parameters=total,
        active_parameters=active,
        trained_parameters=count_trained(module.model),
        skipped_steps=module.guard.skipped,
        expert_load=metrics.expert_load,
        environment=_environment(trainer),
        sources=_source_counts(trainer),
    )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _source_counts(trainer: Trainer) -> list[dict[str, Any]]:
    counts = getattr(getattr(trainer, "datamodule", None), "source_counts", None)
    return [] if counts is None else counts()


def _environment(trainer: Trainer) -> dict[str, Any]:
    return {
        **environment(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def table(report: Report, title: str) -> Table:
    """Lay a report out for a terminal."""
    grid = Table(title=title, show_header=False, title_justify="left")
    grid.add_column(style="bold")
    grid.add_column(justify="right")
    rows = [
        ("train loss", _number(report.train_loss, ".3f", "nats/token")),
        ("val loss", _number(report.val_loss, ".3f", "nats/token")),
        ("val bits per byte", _number(report.val_bits_per_byte, ".3f")),
        ("val perplexity", _number(report.val_perplexity, ".1f")),
        ("steps", f"{report.steps:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("tokens/s", f"{report.tokens_per_second:,.0f}"),
        (
            "MFU",
            f"{report.mfu:.0%} of {report.peak_flops[0] / 1e9:,.0f} GFLOP/s "
            f"({report.peak_flops[1]})",
        ),
        ("training time", f"{report.train_seconds:.0f} s"),
        ("parameters", f"{report.total_parameters:,}"),
        ("active per token", f"{report.active_parameters:,}"),
    ]
    if report.trained_parameters != report.total_parameters:
        share = report.trained_parameters / report.total_parameters
        rows.append(("trained", f"{report.trained_parameters:,} ({share:.2%} of all)"))
    if report.skipped_steps:
        rows.append(("skipped steps", f"{report.skipped_steps:,}"))
    for source in report.sources:
        counts = f"{source['tokens']:,} tokens, {source['epochs']:.2f} epochs"
        rows.append((f"of {source['path']}", counts))
    for load in report.expert_load:
        rows.append((f"experts of layer {load.layer}", _describe(load)))
    for row in rows:
        grid.add_row(*row)
    return grid


def _describe(load: ExpertLoad) -> str:
    """Return how evenly a layer's experts were used: how many at all, where that is not all."""
    parts = []
    if load.max_over_mean is not None and load.entropy is not None:
        parts.append(f"busiest {load.max_over_mean:.2f} × mean, evenness {load.entropy:.3f}")
    if load.usage is not None and (load.usage < 1 or not parts):
        best = f" (best {load.top1_usage:.1%})" if load.top1_usage is not None else ""
        parts.append(f"usage {load.usage:.1%}{best} per batch")
    if load.unevenness is not None and load.max_over_mean is None:
        parts.append(f"unevenness {load.unevenness:.2f} nats")
    if load.dropped:
        parts.append(f"{load.dropped:.1%} dropped")
    if load.without_expert:
        parts.append(f"{load.without_expert:.1%} of tokens without an expert")
    return ", ".join(parts)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}} {unit}".strip()


def draw_losses(path: Path, rows: list[dict[str, str]], title: str) -> None:
    """Draw training loss, raw and smoothed, and validation loss over tokens."""
    from matplotlib.figure import Figure

    train = _series(rows, "train/loss")
    validation = _series(rows, "val/loss")
    unit, name = (1e6, "million tokens") if train[0][-1] >= 1e6 else (1e3, "thousand tokens")
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    tokens = [t / unit for t in train[0]]
    axes.plot(tokens, train[1], color="tab:blue", alpha=0.3, linewidth=0.8)
    smooth = smoothed(train[1])
    label = f"train, smoothed ({smooth[-1]:.3f})"
    # A single point would not be seen without a mark.
    axes.plot(tokens, smooth, "" if len(tokens) > 1 else "s", color="tab:blue", label=label)
    if validation[0]:
        axes.plot(
            [t / unit for t in validation[0]],
            validation[1],
            color="tab:orange",
            marker="o",
            markersize=4,
            label=f"validation ({validation[1][-1]:.3f})",
        )
    axes.set(title=title, xlabel=name, ylabel="loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(path, figure)


def _series(rows: list[dict[str, str]], name: str) -> tuple[list[float], list[float]]:
    points = [(float(r["tokens"]), float(r[name])) for r in rows if name in r and "tokens" in r]
    finite = [point for point in points if math.isfinite(point[1])]
    return [tokens for tokens, _ in finite], [value for _, value in finite]


def sample(checkpoint: Path, prompt: str, tokens: int) -> str:
    """Return text that the trained model continues, with a fixed seed, up to its length."""
    with alone():  # other processes do not write
        model, words = load_any_with_tokenizer(checkpoint, device=pick_device("auto"))
        room = model.config.max_position_embeddings - len(prompt_ids(words, prompt))
        if room < 1:
            return prompt
        return prompt + continue_text(model, words, prompt, max_new_tokens=min(tokens, room))


def smoothed(values: list[float]) -> list[float]:
    """Average exponentially over about a twentieth of the points, without bias at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        means.append(total / weight)
    return means
