"""Stopping at or skipping an optimizer step whose loss or gradient is not finite, or leaps.

A skipped step updates nothing, neither by the gradient nor by what the layers observed, and its
batch is not seen again; schedule, data and random numbers go on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from moezoo import FeedForward
from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.routing.losses import sum_over_ranks
from moezoo_train.optim.schedule import RunSchedule
from moezoo_train.parallel.distributed import process_count

MAX_SKIPPED_IN_A_ROW = 10
MAX_OVERFLOWS_IN_A_ROW = 40
"""Each halves fp16's scale, which begins at 2¹⁶: so small a scale rounds every gradient to zero."""


@dataclass(frozen=True)
class SpikeRule:
    """Which steps are skipped although they are finite, as by OLMo-core's ``SkipStepOptimizer``.

    Those whose loss or gradient norm exceeds the mean of the last steps by so many standard
    deviations. What is skipped enters the mean too, so that a lasting change is accepted. The rule
    begins when half of a window has been seen.

    Attributes:
        sigmas: standard deviations.
        window: number of last steps.

    Raises:
        InputError: one is out of range.
    """

    sigmas: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        check_number("spikes.sigmas", self.sigmas)
        check_int("spikes.window", self.window, minimum=4)


class StepGuard:
    """Judges every step before its update.

    Args:
        on_nan: at a loss or gradient that is not finite: ``stop``, or ``skip`` the step, and stop
            after ten in a row.
        spikes: which finite steps are skipped; None: none.

    Attributes:
        skipped: number of skipped steps, without those of which fp16's gradients overflowed.
        taken: whether the last step was allowed.

    Raises:
        InputError: ``on_nan`` is neither.
    """

    def __init__(self, on_nan: str, spikes: SpikeRule | None = None) -> None:
        self.on_nan = check_choice("on_nan", on_nan, ["stop", "skip"])
        self.spikes = spikes
        self.skipped = 0
        self.taken = True
        self._overflows = 0
        self._in_a_row = 0
        length = spikes.window if spikes is not None else 0
        self._scaler: dict[str, Any] = {}
        self._recent: list[deque[float]] = [deque(maxlen=length), deque(maxlen=length)]

    def allows(self, trainer: Trainer, losses: Tensor, grad_norm: float) -> bool:
        """Return whether to update, on all processes alike; all must call this.

        Args:
            trainer: the trainer.
            losses: of this process's micro-batches, shape ``(accumulated,)``.
            grad_norm: of the whole gradient, before clipping.

        Raises:
            InputError: the run is to end here; nothing was updated.
        """
        total = float(losses.sum())
        # fp16's gradient scaler has looked for overflow itself, and will lower the scale.
        scaled = str(trainer.precision).startswith("16-mixed")
        sound = math.isfinite(total) and (scaled or math.isfinite(grad_norm))
        agree = trainer.strategy.reduce_boolean_decision
        finite = agree(sound, all=True)
        if finite and scaled and not agree(math.isfinite(grad_norm), all=True):
            self._refuse_overflow(trainer)
            self.taken = False
            return False
        self._overflows = 0
        self.taken = finite and not self._leaps(losses, grad_norm)
        if self.taken:
            self._in_a_row = 0
            return True
        if finite:
            what = f"a spike of the loss, or of the gradient norm to {grad_norm:.4g}"
        elif math.isfinite(total):
            what = f"the gradient norm is {grad_norm}"
        else:
            what = f"loss {total}{_place(trainer, losses)}"
        self._refuse(f"step {trainer.global_step + 1}: {what}", finite)
        if scaled:
            self._scaler = trainer.precision_plugin.state_dict()
        return False

    def settle(
        self, trainer: Trainer, layers: Sequence[FeedForward], schedule: RunSchedule
    ) -> None:
        """Step the layers' state by what they observed, or discard it; after the optimizer's step.

        Args:
            trainer: the trainer.
            layers: those that learn outside the gradient.
            schedule: of the run, which knows how far it is.
        """
        progress = schedule.progress(trainer.global_step + 1)
        for layer in layers:
            if self.taken:
                layer.step(progress)
            else:
                layer.discard()
        if self._scaler:  # it has nothing to learn from a step that was refused
            trainer.precision_plugin.load_state_dict(self._scaler)
            self._scaler = {}

    def _refuse_overflow(self, trainer: Trainer) -> None:
        self._overflows += 1
        if self._overflows >= MAX_OVERFLOWS_IN_A_ROW:
            raise InputError(
                f"step {trainer.global_step + 1}: the gradient overflows fp16, the "
                f"{self._overflows}th time in a row, at whatever scale; nothing was updated and "
                "the last checkpoint stays: set trainer.precision to bf16-mixed"
            )

    def _leaps(self, losses: Tensor, grad_norm: float) -> bool:
        """Return whether a finite step is a spike, and remember it."""
        if self.spikes is None or not math.isfinite(grad_norm):
            return False
        loss = float(sum_over_ranks(losses.mean())) / process_count()
        leaps = False
        for recent, value in zip(self._recent, (loss, grad_norm), strict=True):
            if len(recent) >= self.spikes.window // 2:
                leaps |= value - fmean(recent) > self.spikes.sigmas * stdev(recent)
            recent.append(value)
        return leaps

    def _refuse(self, where: str, finite: bool) -> None:
        if self.on_nan == "stop" and not finite:
            raise InputError(
                f"{where}; nothing was updated and the last checkpoint stays: lower optimizer.lr, "
                "clip gradients (trainer.gradient_clip_val), or set model.on_nan to skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise InputError(
                f"{where}, the {self._in_a_row}th skipped step in a row: the model does not "
                "recover; go on from the last checkpoint with a lower trainer.gradient_clip_val, "
                "or begin anew with a lower optimizer.lr"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge alike."""
        recent = [list(values) for values in self._recent]
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; with a smaller window, from its last steps."""
        self.skipped, self._in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        for recent, values in zip(self._recent, state.get("recent", ((), ())), strict=True):
            recent.clear()
            recent.extend(values)


def _place(trainer: Trainer, losses: Tensor) -> str:
    """Name the first micro-batch whose loss is not finite, if the data can."""
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "name_batch"):
        return ""
    first = int(losses.isfinite().logical_not().nonzero()[0])
    return f" in {data.name_batch(len(losses) - 1 - first)}"
