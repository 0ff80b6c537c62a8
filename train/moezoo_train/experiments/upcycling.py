"""``moezoo compare upcycling``: is a mixture of copies worth more than training the dense model on?

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055) and drop-upcycling (Nakamura et al.
2025, arXiv:2502.19261) continue a dense model as a mixture. A token costs more in it, so at equal
training FLOPs it sees fewer of them. All contenders begin with the same weights and read the same
tokens in the same order, each with a whole schedule of its own length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console

from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.directory import CONFIG, existing, read_json
from moezoo_models.checkpoints.export import export
from moezoo_models.checkpoints.locks import writing
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.model.config import MoezooConfig
from moezoo_train.experiments.common.options import TextOptions
from moezoo_train.experiments.common.report import write_report
from moezoo_train.experiments.common.short_run import fit, open_text, validate
from moezoo_train.measure.progress import quiet_lightning
from moezoo_train.measure.throughput import count_parameters, forward_flops_per_token
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.precision import precision_here

BACKWARD = 3
"""FLOPs of a training step over those of its forward pass."""


@dataclass(frozen=True)
class ContenderResult:
    """How one contender did.

    Attributes:
        name: the contender.
        steps: optimizer steps.
        tokens: trained on.
        flops: of training, in all.
        total_parameters: of the model.
        active_parameters: those that one token touches.
        start_loss: validation loss before training, nats per token.
        val_loss: at the end.
        bits_per_byte: the same per byte of text.
        seconds: that training took.
    """

    name: str
    steps: int
    tokens: int
    flops: float
    total_parameters: int
    active_parameters: int
    start_loss: float
    val_loss: float
    bits_per_byte: float
    seconds: float


def compare_upcycling(
    source: str,
    output: str = "runs/upcycling",
    experts: int = 8,
    top_k: int = 2,
    drop: float = 0.5,
    to: str | None = None,
    max_steps: int = 400,
    seed: int = 1,
    precision: str = "32-true",
    text: TextOptions = TextOptions(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
) -> list[ContenderResult]:
    """Train a dense model on, as it is and upcycled, with the same tokens and the same FLOPs.

    Beside the dense model at equal FLOPs stands the dense model at the mixture's number of tokens,
    which costs less. Writes table.md and results.json, and a folder for each contender.

    Args:
        source: directory of the dense model, of ours or of any family that upcycle reads.
        output: directory to make.
        experts: copies of each feed-forward block.
        top_k: experts per token.
        drop: fraction of neurons drawn anew in drop-upcycling; 0 leaves that contender out.
        to: format of the mixtures, as for upcycle; default: the source's closest relative.
        max_steps: optimizer steps of the dense model; the mixtures' follow from their FLOPs.
        seed: of upcycling, and of the order of the text; another than the dense model's training
            had.
        precision: as the trainer's, e.g. 32-true or bf16-mixed; auto is bf16-mixed on a GPU that
            has bf16, else 32-true.
        text: data_dir as the dense model's run left it, sequence_length, batch_size.
        optimizer: how parameters are updated.
        schedule: how the learning rate moves.

    Returns:
        What is printed.

    Raises:
        InputError: the source cannot be upcycled, or the output is there already.
    """
    check_int("max_steps", max_steps)
    precision = precision_here(precision)
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"output: {folder} is there already; name a new directory")
    with writing(folder):
        starts = _starts(existing(Path(source)), folder, experts, top_k, drop, to, seed)
        quiet_lightning()
        flops = {name: _flops(start, text) for name, start in starts.items()}
        plan = {name: round(max_steps * flops["dense"] / flops[name]) for name in starts}
        plan["dense, same tokens"] = plan["upcycled"]
        starts["dense, same tokens"] = starts["dense"]
        flops["dense, same tokens"] = flops["dense"]
        console = Console(stderr=True)
        outcomes = []
        for number, (name, steps) in enumerate(plan.items(), 1):
            pl.seed_everything(seed, verbose=False)
            data = open_text(text, seed)
            module = _module(starts[name], data.vocab_size, optimizer, schedule)
            place = folder / "runs" / name.replace(", ", "-").replace(" ", "_")
            start_loss, _ = validate(module, text, precision)
            report, _ = fit(module, data, place, steps, precision, console)
            module.save(place / "model", data.tokenizer)
            total, active = count_parameters(module.model)
            assert report.val_loss is not None
            assert report.val_bits_per_byte is not None
            outcomes.append(
                ContenderResult(
                    name,
                    steps,
                    report.tokens,
                    BACKWARD * flops[name] * report.tokens,
                    total,
                    active,
                    start_loss,
                    report.val_loss,
                    report.val_bits_per_byte,
                    report.train_seconds,
                )
            )
            line = f"[{number}/{len(plan)}] {name}: val loss {report.val_loss:.3f}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        _report(folder, outcomes)
    return outcomes


def _starts(
    source: Path, folder: Path, experts: int, top_k: int, drop: float, to: str | None, seed: int
) -> dict[str, Path]:
    """Write the directories that the contenders begin with."""
    starts = {"dense": source}
    if read_json(source / CONFIG).get("model_type") == MoezooConfig.model_type:
        starts["dense"] = export(source, folder / "starts" / "dense")
    rates = {"upcycled": 0.0} | ({f"drop-upcycled, {drop:g}": drop} if drop else {})
    for number, (name, rate) in enumerate(rates.items()):
        starts[name] = folder / "starts" / f"upcycled{number}"
        upcycle(starts["dense"], starts[name], experts, top_k, drop=rate, to=to, seed=seed)
    return starts


def _module(
    start: Path, vocab_size: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> LanguageModel:
    return LanguageModel(
        vocab_size, initialize_from=str(start), optimizer=optimizer, schedule=schedule
    )


def _flops(start: Path, text: TextOptions) -> int:
    """Return a token's forward FLOPs."""
    module = _module(start, open_text(text, 0).vocab_size, OptimizerConfig(), ScheduleConfig())
    return forward_flops_per_token(module.model, text.sequence_length)


COLUMNS = (
    "contender",
    ">steps",
    ">tokens",
    ">training FLOPs",
    ">parameters",
    ">active",
    ">loss at the start",
    ">loss at the end",
    ">bits per byte",
)


def _report(folder: Path, outcomes: list[ContenderResult]) -> None:
    """Print and write the table, the verdict and the numbers."""
    rows = [
        [
            each.name,
            f"{each.steps:,}",
            f"{each.tokens:,}",
            f"{each.flops:.3g}",
            f"{each.total_parameters / 1e6:.2f} M",
            f"{each.active_parameters / 1e6:.2f} M",
            f"{each.start_loss:.4f}",
            f"{each.val_loss:.4f}",
            f"{each.bits_per_byte:.4f}",
        ]
        for each in outcomes
    ]
    write_report(
        folder,
        "Upcycled and dense at equal FLOPs",
        COLUMNS,
        rows,
        {"results": [asdict(each) for each in outcomes]},
        summary=verdict(outcomes),
    )


def verdict(outcomes: list[ContenderResult]) -> str:
    """Return which contender is ahead at equal FLOPs, and by how much."""
    dense = next(each for each in outcomes if each.name == "dense")
    rivals = [each for each in outcomes if each.name not in ("dense", "dense, same tokens")]
    best = min(rivals, key=lambda each: each.val_loss)
    gap = best.val_loss - dense.val_loss
    if gap < 0:
        return (
            f"At equal FLOPs {best.name} is ahead of continued dense training by {-gap:.4f} nats."
        )
    return f"At equal FLOPs continued dense training is ahead of {best.name} by {gap:.4f} nats."
