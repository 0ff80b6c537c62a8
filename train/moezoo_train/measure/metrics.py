"""Metrics logged while training: loss, speed, utilisation, and expert load."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moezoo_train.adapters.lightning import is_last_step
from moezoo_train.measure.expert_load import ExpertLoad, LoadCounter
from moezoo_train.measure.loggers import MetricsCSV, TensorBoard
from moezoo_train.measure.throughput import forward_flops_per_token, peak_flops
from moezoo_train.parallel.distributed import gather_from_ranks

if TYPE_CHECKING:
    from moezoo_train.trained import Measured

_Stats = Sequence[Mapping[str, Tensor]]
"""Statistics of layers, in their order."""


class TrainingMetrics(Callback):
    """Log what the training steps did since the last time, every ``log_every_n_steps``.

    The last step of a run is logged too, whenever it falls. That sets nothing back: a run that is
    made longer logs at its next regular step what it would have without.

    Losses, means over the micro-batches, and the experts' load are of those steps that were taken;
    if none was, the loss is NaN. They survive an interruption between two logged steps, so that a
    resumed run logs the same numbers; and what a checkpoint counts as logged has been handed to the
    loggers before, as checkpoints are written after this callback.

    Attributes:
        tokens: trained on so far, on all ranks, over resumed runs too.
        seconds: spent on them, validation not included.
        expert_load: of the layers, since the last logged step.
        peak: the device's peak in FLOP/s, and how it is known.
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
        self._memory_load = LoadCounter()
        self._window: list[tuple[dict[str, Tensor], _Stats, _Stats]] = []
        self._loaded: list[dict[str, Any]] = []
        self._clock = 0.0
        self._logged = (0, 0.0)
        self._sequence_length = 0
        self._last_row = -1

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
        self._window.append((losses, outputs["ffn_stats"], outputs.get("memory_stats", ())))
        if trainer.global_step == self._step:
            return  # still accumulating
        self._step = trainer.global_step
        self._count(taken=cast("Measured", pl_module).guard.taken)
        # What other callbacks log has this number, not Lightning's count from 0.
        pl_module.log("step", float(self._step), on_step=True)
        self._sequence_length = batch["input_ids"].shape[1]
        regular = is_logged(trainer, self._step)
        if regular or (self._losses and is_last_step(trainer)):
            metrics = self._write(trainer, pl_module)
            pl_module.log_dict(metrics, on_step=True, logger=False)
        if regular:
            self._logged, self._losses = (self.tokens, self.seconds), {}
            self._load.clear()
            self._memory_load.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last step where a validation behind it has ended the run, as early stopping."""
        asked = any(getattr(c, "stopped_by", None) for c in trainer.checkpoint_callbacks)
        if self._losses and self._last_row != self._step and not asked:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Hand the metrics to the loggers; Lightning would later, behind the step's checkpoint."""
        metrics = self._metrics(trainer, pl_module)
        self._last_row = self._step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)
            logger.save()
        return metrics

    def _count(self, taken: bool) -> None:
        """Add the micro-batches of a step, or drop them with it."""
        for losses, ffn_stats, memory_stats in self._window if taken else ():
            for name, value in losses.items():
                self._losses.setdefault(name, []).append(value)
            self._load.add(ffn_stats)
            self._memory_load.add(memory_stats)
        self._window = []

    def _metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        if not self._flops_per_token:
            model = cast("Measured", pl_module).model
            self._flops_per_token = forward_flops_per_token(model, self._sequence_length)
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self.tokens_per_second = tokens / max(seconds, 1e-9)
        # The backward pass takes twice the forward pass.
        flops_per_second = 3 * self._flops_per_token * self.tokens_per_second
        self.mfu = flops_per_second / (self.peak[0] * trainer.world_size)
        self.expert_load = self._load.loads(trainer)
        losses = self._losses or {"train/loss": [torch.tensor(math.nan, device=pl_module.device)]}
        metrics = {
            "tokens": float(self.tokens),
            **{name: _mean(trainer, values) for name, values in losses.items()},
            "train/lr": self._lr,
            "train/tokens_per_second": self.tokens_per_second,
            "train/mfu": self.mfu,
            # The backward pass takes twice the forward pass.
            "train/flops": 3.0 * self._flops_per_token * self.tokens,
            "train/grad_norm": cast("Measured", pl_module).grad_norm,
            **{
                f"train/grad_norm/{name}": norm
                for name, norm in cast("Measured", pl_module).clip_group_norms.items()
            },
            "train/skipped_steps": float(cast("Measured", pl_module).guard.skipped),
        }
        for kind, loads in (
            ("layer", self.expert_load),
            ("memory", self._memory_load.loads(trainer)),
        ):
            for load in loads:
                for field, value in asdict(load).items():
                    if field != "layer" and value is not None:
                        metrics[f"experts/{field}/{kind}_{load.layer:02d}"] = value
        return metrics

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is no training time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self._clock

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how many tokens the validated model has seen."""
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
            "memory_load": self._memory_load.state_dict(),
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
            self._memory_load.load_state_dict(pending.get("memory_load", {}), device)
            self._losses = {
                name: [value.to(device) for value in values]
                for name, values in pending["losses"].items()
            }
        self._loaded = []


def is_logged(trainer: Trainer, step: int) -> bool:
    """Return whether a step is regularly logged; with ``log_every_n_steps`` 0 none is."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and step % every == 0


def _mean(trainer: Trainer, values: list[Tensor]) -> float:
    return float(trainer.strategy.reduce(torch.stack(values).mean(), reduce_op="mean"))
