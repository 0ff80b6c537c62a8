"""What is logged while training: loss, speed, utilisation, and how evenly experts are used."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moezoo.routing.stats import load_entropy, max_violation
from moezoo_train.measure.loggers import MetricsCSV, TensorBoard
from moezoo_train.measure.throughput import forward_flops_per_token, peak_flops
from moezoo_train.parallel.distributed import gather_from_ranks

if TYPE_CHECKING:
    from moezoo_train.run.module import LanguageModel


@dataclass(frozen=True)
class ExpertLoad:
    """How one layer used its experts, values, leaves or neurons: its slots.

    The first two are those of the choices of all micro-batches together; they are None where a
    layer has too many slots to count at every step. Usage and unevenness are means over
    micro-batches of each one's own: fewer tokens reach fewer slots. `moezoo inspect usage`
    measures them over a whole text.

    Attributes:
        layer: number of the block in the model.
        max_over_mean: choices of the busiest slot over the mean; 1 is even, N is one slot for
            everything. Less 1 it is MaxVio (arXiv:2408.15664).
        entropy: of the slots' shares of the choices, divided by log N: 1 is even, 0 is one slot.
        router_entropy: mean entropy of a token's routing probabilities, divided by log E; None
            where nothing is learned, as in a hash layer.
        dropped: share of assignments dropped for lack of capacity; None where there is no such.
        usage: share of the slots that had any weight.
        unevenness: divergence of the slots' weights from uniform, in nats.
        top1_usage: share of the slots that were some head's best; None where there are no heads.
        density: mean share of a token's neurons that are not zero; None but for top-k activation.
        node_entropy: mean entropy of a tree's decisions in nats; None where there is no tree.
    """

    layer: int
    max_over_mean: float | None
    entropy: float | None
    router_entropy: float | None
    dropped: float | None
    usage: float | None = None
    unevenness: float | None = None
    top1_usage: float | None = None
    density: float | None = None
    node_entropy: float | None = None


_MEANS = ("router_entropy", "usage", "unevenness", "top1_usage", "density", "node_entropy")
"""Statistics of a micro-batch that are averaged over tokens."""


class LoadCounter:
    """Adds up the layers' statistics over micro-batches, on the device, without waiting for it."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}

    def add(self, ffn_stats: Sequence[Mapping[str, Tensor]]) -> None:
        """Add one forward pass: the statistics of each block; few, where nothing is chosen."""
        for layer, stats in enumerate(ffn_stats):
            if "expert_counts" not in stats and "usage" not in stats:
                continue
            tokens = precise(stats["tokens"])
            new = {"tokens": tokens}
            new |= {k: precise(stats[k]) for k in ("expert_counts", "dropped") if k in stats}
            new |= {k: precise(stats[k]) * tokens for k in _MEANS if k in stats}
            old = self._sums.get(layer)
            self._sums[layer] = {k: v + old[k] for k, v in new.items()} if old else new

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Return the sums so far."""
        return {
            layer: {name: value.cpu() for name, value in sums.items()}
            for layer, sums in self._sums.items()
        }

    def load_state_dict(
        self, state_dict: dict[int, dict[str, Tensor]], device: torch.device
    ) -> None:
        """Go on from the sums."""
        self._sums = {
            layer: {name: value.to(device) for name, value in sums.items()}
            for layer, sums in state_dict.items()
        }

    def take(self, trainer: Trainer | None = None) -> list[ExpertLoad]:
        """Sum over ranks, start again from zero, and say how evenly the experts were used."""
        loads = []
        for layer, sums in sorted(self._sums.items()):
            if trainer is not None:
                sums = {k: _sum_over_ranks(trainer, v) for k, v in sums.items()}
            loads.append(_expert_load(layer, sums))
        self._sums = {}
        return loads


def _expert_load(layer: int, sums: Mapping[str, Tensor]) -> ExpertLoad:
    tokens = sums["tokens"].clamp(min=1)
    figures = {name: float(sums[name] / tokens) if name in sums else None for name in _MEANS}
    counts = sums.get("expert_counts")
    if counts is None:
        return ExpertLoad(layer, None, None, dropped=None, **figures)
    if figures["router_entropy"] is not None:
        figures["router_entropy"] /= math.log(len(counts)) or 1.0
    dropped = sums["dropped"] / counts.sum().clamp(min=1) if "dropped" in sums else None
    return ExpertLoad(
        layer,
        max_over_mean=float(max_violation(counts)) + 1,
        entropy=float(load_entropy(counts)),
        dropped=None if dropped is None else float(dropped),
        **figures,
    )


def precise(value: Tensor) -> Tensor:
    """Convert to the widest floating type that the device has, for sums over many tokens."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


class TrainingMetrics(Callback):
    """Log what the training steps did since the last time, every ``log_every_n_steps``.

    Losses, means over the micro-batches, and the experts' load are of those steps that were taken;
    if none was, the loss is NaN. They survive an interruption between two logged steps, so that a
    resumed run logs the same numbers; and what a checkpoint counts as logged has been handed to the
    loggers before, as checkpoints are written after this callback.

    Attributes:
        tokens: trained on so far, on all ranks, over resumed runs too.
        seconds: spent on them, validation not included.
        expert_load: of the layers, since the last logged step.
        peak: what the device can do, in FLOP/s, and how that is known.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.expert_load: list[ExpertLoad] = []
        self.tokens_per_second = 0.0
        self.mfu = 0.0
        self.peak: tuple[float, str] = (0.0, "")
        self._flops_per_token = 0
        self._step = 0
        self._lr = 0.0
        self._losses: dict[str, list[Tensor]] = {}
        self._load = LoadCounter()
        self._window: list[tuple[dict[str, Tensor], Sequence[Mapping[str, Tensor]]]] = []
        self._loaded: list[dict[str, Any]] = []
        self._clock = 0.0
        self._logged = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the machine and start the clock."""
        half = "bf16" in str(trainer.precision) or "16" in str(trainer.precision)
        dtype = torch.bfloat16 if half else torch.float32
        self.peak = peak_flops(pl_module.device, dtype)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV | TensorBoard):
                logger.start(trainer.global_step)
        self._window = []
        self._restore(trainer, pl_module.device)
        self._step = trainer.global_step
        self._logged = (self.tokens, self.seconds)
        self._clock = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rate of this step; the schedule moves it right after."""
        groups = optimizer.param_groups
        # Where tables alone are trained, no group follows the schedule.
        self._lr = max(g["lr"] for g in [g for g in groups if g["schedule"]] or groups)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Add a micro-batch, and log if it ended a step that is to be logged."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        losses = {"train/loss": outputs["lm_loss"]}
        losses |= {f"train/aux/{name}": value for name, value in outputs["aux"].items()}
        self._window.append((losses, outputs["ffn_stats"]))
        if trainer.global_step == self._step:
            return  # still accumulating
        self._step = trainer.global_step
        self._count(taken=cast("LanguageModel", pl_module).guard.taken)
        # What other callbacks log has this number, not Lightning's count from 0.
        pl_module.log("step", float(self._step), on_step=True)
        if is_logged(trainer, self._step):
            if not self._flops_per_token:
                model = cast("LanguageModel", pl_module).model
                self._flops_per_token = forward_flops_per_token(model, batch["input_ids"].shape[1])
            metrics = self._metrics(trainer, pl_module)
            self._losses = {}
            # Lightning would hand them to the loggers later, behind the step's checkpoint.
            pl_module.log_dict(metrics, on_step=True, logger=False)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self._step)
                logger.save()

    def _count(self, taken: bool) -> None:
        """Add the micro-batches of a step, or drop them with it."""
        for losses, ffn_stats in self._window if taken else ():
            for name, value in losses.items():
                self._losses.setdefault(name, []).append(value)
            self._load.add(ffn_stats)
        self._window = []

    def _metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.tokens, self.seconds)
        self.tokens_per_second = tokens / max(seconds, 1e-9)
        # The backward pass takes twice the forward pass.
        flops_per_second = 3 * self._flops_per_token * self.tokens_per_second
        self.mfu = flops_per_second / (self.peak[0] * trainer.world_size)
        self.expert_load = self._load.take(trainer)
        losses = self._losses or {"train/loss": [torch.tensor(math.nan, device=pl_module.device)]}
        metrics = {
            "tokens": float(self.tokens),
            **{name: _mean(trainer, values) for name, values in losses.items()},
            "train/lr": self._lr,
            "train/tokens_per_second": self.tokens_per_second,
            "train/mfu": self.mfu,
            "train/grad_norm": cast("LanguageModel", pl_module).grad_norm,
            **{
                f"train/grad_norm/{name}": norm
                for name, norm in cast("LanguageModel", pl_module).clip_group_norms.items()
            },
            "train/skipped_steps": float(cast("LanguageModel", pl_module).guard.skipped),
        }
        for load in self.expert_load:
            for field, value in asdict(load).items():
                if field != "layer" and value is not None:
                    metrics[f"experts/{field}/layer_{load.layer:02d}"] = value
        return metrics

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is no training time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self._clock

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many tokens the validated model has seen."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.log_dict({"step": float(self._step), "tokens": float(self.tokens)})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._clock = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Keep the totals, and what is not logged yet, of every rank."""
        pending = {
            "losses": {name: [v.cpu() for v in values] for name, values in self._losses.items()},
            "load": self._load.state_dict(),
        }
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "ranks": gather_from_ranks(pending),
            "last": {
                "expert_load": [asdict(load) for load in self.expert_load],
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu,
                "peak": list(self.peak),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals, and from the last logged figures until there are new ones."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self._loaded = state_dict["ranks"]
        if last := state_dict.get("last"):
            self.expert_load = [ExpertLoad(**load) for load in last["expert_load"]]
            self.tokens_per_second, self.mfu = last["tokens_per_second"], last["mfu"]
            self.peak = last["peak"][0], last["peak"][1]

    def _restore(self, trainer: Trainer, device: torch.device) -> None:
        if len(self._loaded) == trainer.world_size:
            pending = self._loaded[trainer.global_rank]
            self._load.load_state_dict(pending["load"], device)
            self._losses = {
                name: [value.to(device) for value in values]
                for name, values in pending["losses"].items()
            }
        self._loaded = []


def is_logged(trainer: Trainer, step: int) -> bool:
    """Tell whether the metrics of a step are logged; with ``log_every_n_steps`` 0 those of none."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and step % every == 0


def _mean(trainer: Trainer, values: list[Tensor]) -> float:
    return float(trainer.strategy.reduce(torch.stack(values).mean(), reduce_op="mean"))


def _sum_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    # reduce works in place, and the sums of several layers may share a tensor
    return cast(Tensor, trainer.strategy.reduce(value.clone(), reduce_op="sum"))
