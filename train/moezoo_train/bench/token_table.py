"""A training step of a model with a table of a gigabyte, against the model without the table.

By CPU time: a batch reads some thousand rows of the millions, and pays for those alone, so that the
other gigabyte makes no step longer. Where it does, something goes over the whole table.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moezoo.bench.case import Case, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Spent, Task

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

_BATCHES = 8  # in turn, or the rows of the only one would stay in the caches
_LIMIT = 1.0


@dataclass(frozen=True)
class Steps:
    """What both sides are given: sizes, and batches of inputs and labels ``(B, S)``."""

    setting: Setting
    batches: list[tuple[Tensor, Tensor]]

    def job(self, model: MoezooForCausalLM) -> Job:
        """Return the step of a model: gradients, norms, clipping and the optimizer, as in a run."""
        from moezoo_models.checkpoints.stock import predict
        from moezoo_train.optim import clipping
        from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer

        model.train()
        optimizer = build_optimizer(model, OptimizerConfig())
        batches = itertools.cycle(self.batches)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = predict(model, *next(batches)).loss
            assert loss is not None
            loss.backward()
            gradients = clipping.grouped_gradients(optimizer)
            clipping.clip_norms(gradients, clipping.gradient_norms(gradients), _LIMIT)
            optimizer.step()
            return loss.detach()

        return Job(_cpu_timed(step), lambda: {"the loss": step()})


def _cpu_timed(call: Callable[[], object]) -> Callable[[], Spent]:
    """Return a run in this process, by the CPU time of its threads."""

    def run() -> Spent:
        start = time.process_time()
        call()
        return Spent(time.process_time() - start)

    return run


def _model(setting: Setting, table: bool) -> MoezooForCausalLM:
    from moezoo_models import MoezooConfig, MoezooForCausalLM

    rules: list[dict[str, Any]] = [{"layers": "all", "class_path": "moezoo.DenseFFN"}]
    if table:
        options = {"num_rows": setting["R"], "vocab_size": setting["V"], "sparse": True}
        rules.append({"layers": [1], "class_path": "moezoo.Engram", "init_args": options})
    return MoezooForCausalLM(
        MoezooConfig(
            vocab_size=setting["V"],
            hidden_size=setting["d"],
            num_hidden_layers=setting["L"],
            num_attention_heads=setting["H"],
            max_position_embeddings=setting["S"],
            ffn=rules,
        )
    )


def _build(setting: Setting, folder: Path) -> Task:
    shape = (setting["B"], setting["S"] + 1)
    drawn = [torch.randint(setting["V"], shape) for _ in range(_BATCHES)]
    steps = Steps(setting, [(ids[:, :-1], ids[:, 1:].contiguous()) for ids in drawn])
    return Task(steps.job(_model(setting, table=True)), steps)


def _without_table(steps: Steps) -> Job:
    """Dense blocks alone, as wide."""
    return steps.job(_model(steps.setting, table=False))


CASES = [
    Case(
        "token-table-1gb",
        "end-to-end",
        "training step with a token table of 1 GB",
        {"B": 4, "S": 256, "V": 4096, "d": 256, "L": 6, "H": 8, "R": 1 << 20},
        {"B": 2, "S": 8, "V": 64, "d": 32, "L": 2, "H": 2, "R": 1000},
        _build,
        {"without-the-table": Peer(_without_table, same=False, target=Target(forward=1 / 1.15))},
        unit="ms",
    )
]
