"""Learning-rate schedules over optimizer steps, and how a run that is made longer goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.matrices import Matrix
from moezoo_train.adapters.torch_core import set_learning_rates


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Attributes:
        name: ``cosine``: from the peak down half a cosine to the end of the run. ``wsd``: warm up,
            stay, decay linearly over the last part (arXiv:2404.06395). ``constant``: stay.
        warmup_steps: optimizer steps of linear warm-up, in every schedule; where the schedule is no
            longer than that, a tenth of it.
        decay_fraction: part of the run that ``wsd`` decays over.
        min_lr_ratio: where the decay ends, as a fraction of the peak.
        total_steps: where the run ends; default: the trainer's max_steps, or what max_epochs
            amounts to. Needed when only max_time limits the run.
        continuation: the plan for a run whose end moved after its checkpoint was written.
            ``stretch``: the schedule is laid over the whole run as if that had always been its
            length, so the rate of a decayed run rises. ``hold``: the earlier schedule ends where it
            was to end, and its last rate stays. ``rewarm``: from the checkpoint on, the rate warms
            up from where it was to its peak and decays to the new end (arXiv:2403.08763).
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1
    total_steps: int | None = None
    continuation: Literal["stretch", "hold", "rewarm"] = "stretch"

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, ["cosine", "wsd", "constant"])
        check_int("schedule.warmup_steps", self.warmup_steps, minimum=0)
        check_number("schedule.decay_fraction", self.decay_fraction, maximum=1.0)
        check_number("schedule.min_lr_ratio", self.min_lr_ratio, maximum=1.0)
        check_choice("schedule.continuation", self.continuation, ["stretch", "hold", "rewarm"])
        if self.total_steps is not None:
            check_int("schedule.total_steps", self.total_steps)


@dataclass(frozen=True)
class Span:
    """The optimizer steps that a schedule is laid over.

    Attributes:
        end: where it ends; None if it need not know.
        start: where its warm-up begins.
        floor: factor on the peak learning rate that the warm-up begins from.
    """

    end: int | None
    start: int = 0
    floor: float = 0.0


def warmup_of(config: ScheduleConfig, span: Span) -> int:
    """Return the steps of a schedule's warm-up: as configured, or a tenth of one that is shorter.

    By default a run of 1000 steps warms up for 100, the same share.
    """
    if span.end is None:
        return config.warmup_steps
    steps = max(span.end - span.start, 0)
    return config.warmup_steps if config.warmup_steps < steps else steps // 10


def lr_factor(config: ScheduleConfig, step: int, span: Span | int | None) -> float:
    """Return the factor on the peak learning rate at optimizer step ``step``, counted from 0.

    Args:
        config: which schedule.
        step: at least the span's start.
        span: where the schedule lies; a number is the end of one that begins at 0.
    """
    if not isinstance(span, Span):
        span = Span(span)
    done, warmup = step - span.start, warmup_of(config, span)
    if done < warmup:
        return span.floor + (1 - span.floor) * ((done + 1) / max(warmup, 1))
    if config.name == "constant" or span.end is None:
        return 1.0
    steps = span.end - span.start
    if config.name == "cosine":
        progress = (done - warmup) / max(steps - warmup, 1)
        shape = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay_steps = max(1.0, config.decay_fraction * steps)
        shape = min(1.0, max(0.0, (steps - done) / decay_steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class RunSchedule:
    """The schedule of a run, over what a checkpoint says of the steps before.

    Where the run ends and what the checkpoint says become known in either order.

    Args:
        config: which schedule.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self._span: Span | None = None
        self._saved: tuple[Span, float | None, int] | None = None
        self._on: LambdaLR | None = None
        self._end: int | None = None

    def put_on(
        self, optimizer: Optimizer, run_steps: int | None, model: nn.Module | None = None
    ) -> LambdaLR:
        """Attach the schedule to an optimizer; groups with ``schedule`` false keep their rate.

        Args:
            optimizer: with groups from :mod:`moezoo_train.optim.optimizer`.
            run_steps: optimizer steps the trainer will make, if it knows.
            model: whose matrices may follow the run, too.

        Raises:
            InputError: the schedule needs to know where the run ends and nobody says.
        """
        end = self._end = self.config.total_steps or run_steps
        if end is None and model is not None:
            _refuse_schedules_of(model)
        if self.config.name == "constant":
            end = None
        elif end is None:
            raise InputError(
                f"schedule.name: {self.config.name!r} must know where the run ends; set "
                "trainer.max_steps or schedule.total_steps, or use 'constant'"
            )
        self._span = Span(end)
        self._go_on()

        def stay(step: int) -> float:
            return 1.0

        def follow(step: int) -> float:
            return self.factor(step)

        groups = optimizer.param_groups
        self._on = LambdaLR(
            optimizer, [follow if g.get("schedule", True) else stay for g in groups]
        )
        return self._on

    def progress(self, steps: int) -> float | None:
        """Return the share of the run that a number of optimizer steps is; None without an end."""
        return None if self._end is None else min(steps / self._end, 1.0)

    def factor(self, step: int) -> float:
        """Return the factor on the peak learning rate at an optimizer step, counted from 0."""
        return lr_factor(self.config, step, self._span)

    def _describe_warmup(self) -> str | None:
        """Return the line that says how a warm-up is shortened; None where it is not."""
        span, wanted = self._span, self.config.warmup_steps
        if span is None or span.end is None or (taken := warmup_of(self.config, span)) == wanted:
            return None
        return (
            f"schedule.warmup_steps: {wanted} do not fit into {span.end - span.start} steps; the "
            f"warm-up takes {taken}"
        )

    def set_rates(self) -> None:
        """Set the rates of the step to come, which a checkpoint has by the earlier schedule.

        Says so where the warm-up is shortened.
        """
        if self._on is None:
            return
        if line := self._describe_warmup():
            rank_zero_warn(line)
        factors = [follow(self._on.last_epoch) for follow in self._on.lr_lambdas]
        rates = [base * factor for base, factor in zip(self._on.base_lrs, factors, strict=True)]
        set_learning_rates(self._on, rates)

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Describe it for a checkpoint that is written before an optimizer step."""
        if self._span is None:
            return None
        return {**asdict(self._span), "factor": self.factor(step - 1) if step else None}

    def load_state_dict(self, saved: Mapping[str, Any] | None, step: int) -> None:
        """Go on from a checkpoint, as the configuration wants it; say so if the rate rises.

        Args:
            saved: its ``state_dict``, if it has one.
            step: the optimizer step it was written before.

        Raises:
            InputError: ``saved`` is damaged.
        """
        if saved is None:
            return
        try:
            end, last = saved["end"], saved["factor"]
            end = None if end is None else int(end)
            span = Span(end, int(saved["start"]), float(saved["floor"]))
            self._saved = span, None if last is None else float(last), step
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("ckpt_path: the schedule in the checkpoint is damaged") from error
        self._go_on()

    def _go_on(self) -> None:
        if self._span is None or self._saved is None:
            return
        (before, last, step), self._saved = self._saved, None
        new_end, how = self._span.end, self.config.continuation
        if new_end == before.end or how == "hold":
            self._span = before
        elif how == "rewarm" and last is not None:
            self._span = Span(new_end, step, last)
            return
        else:
            self._span = Span(new_end, before.start, before.floor)
        warm = step - self._span.start >= warmup_of(self.config, self._span)
        if last is not None and warm and self.factor(step) > last:
            rank_zero_warn(
                f"schedule: the learning rate rises from {last:.1%} to {self.factor(step):.1%} of "
                f"its peak at step {step + 1}, as the schedule is not the checkpoint's any more; "
                "model.schedule.continuation hold keeps the rate, rewarm warms up and decays again"
            )


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, run_steps: int | None) -> LambdaLR:
    """Put a schedule on an optimizer; see :meth:`RunSchedule.put_on`."""
    return RunSchedule(config).put_on(optimizer, run_steps)


def _refuse_schedules_of(model: nn.Module) -> None:
    if any(isinstance(part, Matrix) and part.scheduled for part in model.modules()):
        raise InputError(
            "trainer.max_steps: the matrices of the model follow the share of the run that is "
            "done, and its end is not known; set it, or schedule.total_steps"
        )
