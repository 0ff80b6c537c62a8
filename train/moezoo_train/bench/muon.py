"""An update by Muon against torch's, of the blocks of the demo's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.bench.case import Case, Peer, Setting
from moezoo.bench.end_to_end import Job, Task, timed
from moezoo_train.bench.models import Architecture


@dataclass(frozen=True)
class Update:
    """Matrices ``(rows, columns)`` and stacks of them, their gradients, and Muon's settings."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    options: dict[str, float]

    def parameters(self) -> list[nn.Parameter]:
        """Return the matrices as parameters of their own, with their gradients."""
        made = []
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            parameter = nn.Parameter(weight.clone())
            parameter.grad = gradient.clone()
            made.append(parameter)
        return made

    def job(self, optimizer: Optimizer, found: Callable[[], Sequence[Tensor]]) -> Job:
        """Return an optimizer's job; its answer is how far two steps moved each matrix.

        The second has other gradients: in the direction of the first, momentum would not show.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def answer() -> dict[str, Tensor]:
            optimizer.step()
            for parameter in parameters:
                parameter.grad = parameter.grad.flip(-1)
            optimizer.step()
            moved = zip(self.weights, found(), strict=True)
            return {f"matrix {n}": new.detach() - old for n, (old, new) in enumerate(moved)}

        return Job(timed(optimizer.step), answer)


def _build(setting: Setting, folder: Path) -> Task:
    from moezoo_train.optim.optimizer import CombinedOptimizer, OptimizerConfig, build_optimizer

    layers = Architecture.of("mixtral", setting.sizes).ours().model.layers
    config = OptimizerConfig(name="muon")
    groups = build_optimizer(layers, config).param_groups
    (group,) = [group for group in groups if group["algorithm"] == "muon"]
    options = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
    weights = [parameter.detach() for parameter in group["params"]]
    update = Update(weights, [torch.randn_like(weight) for weight in weights], options)
    parameters = update.parameters()
    ours = CombinedOptimizer([{**group, "params": parameters}])
    # torch's iterates in bf16, which leaves two to three digits.
    return Task(update.job(ours, lambda: parameters), update, tolerance=5e-2)


def _torch(parts: Update) -> Job:
    """torch.optim.Muon takes matrices alone: each expert is a parameter of its own."""
    stacks = parts.parameters()
    matrices: list[list[nn.Parameter]] = []
    for stack in stacks:
        own = []
        assert stack.grad is not None
        for weight, gradient in zip(_matrices(stack.detach()), _matrices(stack.grad), strict=True):
            parameter = nn.Parameter(weight.clone())
            parameter.grad = gradient.clone()
            own.append(parameter)
        matrices.append(own)
    options: dict[str, Any] = dict(parts.options)
    optimizer = torch.optim.Muon([each for own in matrices for each in own], **options)

    def found() -> list[Tensor]:
        return [
            torch.stack([p.detach() for p in own]).reshape(stack.shape)
            for own, stack in zip(matrices, stacks, strict=True)
        ]

    return parts.job(optimizer, found)


def _matrices(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.unbind() if tensor.ndim == 3 else [tensor]


CASES = [
    Case(
        "muon-demo",
        "end-to-end",
        "Muon's update",
        {"V": 2048, "d": 128, "L": 4, "H": 4, "E": 8, "k": 2},
        {"V": 64, "d": 32, "L": 1, "H": 2, "E": 4, "k": 2},
        _build,
        {"torch.optim.Muon": Peer(_torch)},
        unit="ms",
    )
]
