"""Learning-rate schedules over optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import InputError, check_choice, check_int, check_number


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Attributes:
        name: ``cosine``: from the peak down half a cosine to the end of the run. ``wsd``: warm up,
            stay, decay linearly over the last part (arXiv:2404.06395). ``constant``: stay.
        warmup_steps: optimizer steps of linear warm-up, in every schedule.
        decay_fraction: part of the run that ``wsd`` decays over.
        min_lr_ratio: where the decay ends, as a fraction of the peak.
        total_steps: where the run ends; default: the trainer's max_steps, or what max_epochs
            amounts to. Needed when only max_time limits the run.
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1
    total_steps: int | None = None

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, ["cosine", "wsd", "constant"])
        check_int("schedule.warmup_steps", self.warmup_steps, minimum=0)
        check_number("schedule.decay_fraction", self.decay_fraction, maximum=1.0)
        check_number("schedule.min_lr_ratio", self.min_lr_ratio, maximum=1.0)
        if self.total_steps is not None:
            check_int("schedule.total_steps", self.total_steps)


def lr_factor(config: ScheduleConfig, step: int, total_steps: int | None) -> float:
    """Give the factor on the peak learning rate at optimizer step ``step``, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant" or total_steps is None:
        return 1.0
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay_steps = max(1.0, config.decay_fraction * total_steps)
        shape = min(1.0, max(0.0, (total_steps - step) / decay_steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, run_steps: int | None) -> LambdaLR:
    """Put a schedule on an optimizer; groups with ``schedule`` false keep their learning rate.

    Args:
        optimizer: the optimizer, with groups from :mod:`moezoo_train.optim`.
        config: which schedule.
        run_steps: optimizer steps the trainer will make, if it knows.

    Raises:
        InputError: the schedule needs to know where the run ends and nobody says, or the warm-up
            does not fit into the run.
    """
    total_steps = config.total_steps or run_steps
    if config.name == "constant":
        total_steps = None
    elif total_steps is None:
        raise InputError(
            f"schedule.name: {config.name!r} must know where the run ends; set trainer.max_steps "
            "or schedule.total_steps, or use 'constant'"
        )
    elif config.warmup_steps >= total_steps:
        raise InputError(
            f"schedule.warmup_steps: {config.warmup_steps} does not fit into a run of "
            f"{total_steps} steps; lower it or raise trainer.max_steps"
        )

    def follow(step: int) -> float:
        return lr_factor(config, step, total_steps)

    def stay(step: int) -> float:
        return 1.0

    return LambdaLR(
        optimizer, [follow if g.get("schedule", True) else stay for g in optimizer.param_groups]
    )
