"""Groups of parameters that an optimizer treats alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class ParameterGroup:
    """Parameters that want the same treatment from the optimizer.

    Attributes:
        name: shown in logs.
        parameters: the parameters themselves.
        lr_multiplier: factor on the run's learning rate.
        weight_decay: whether the run's weight decay applies.
        schedule: whether the learning rate follows the run's schedule, or stays constant.
        sparse: whether gradients are sparse tensors (rows of a large table); then no weight decay.
        clip_group: gradients are clipped by their norm over all parameters of this clip group.
    """

    name: str
    parameters: list[nn.Parameter]
    lr_multiplier: float = 1.0
    weight_decay: bool = True
    schedule: bool = True
    sparse: bool = False
    clip_group: str = "main"


def set_apart(groups: list[ParameterGroup], special: list[ParameterGroup]) -> list[ParameterGroup]:
    """Move the parameters of ``special`` groups out of the ``groups`` that hold them too."""
    apart = {id(p) for group in special for p in group.parameters}
    for group in groups:
        group.parameters = [p for p in group.parameters if id(p) not in apart]
    return [group for group in [*groups, *special] if group.parameters]
