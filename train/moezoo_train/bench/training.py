"""One training step, loss and optimizer included, against transformers' model of the same shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from moezoo.bench.case import Case, Package, Peer, Setting, Target, Unavailable
from moezoo.bench.end_to_end import Job, Task, timed
from moezoo.bench.memory import temporary_bytes
from moezoo_kernels.linear import multiply
from moezoo_train.bench.models import Architecture, Family, copied

_TRANSFORMERS = Package("transformers", "pip install 'moezoo[train]'")
_WORTH_IT = 1.5  # as fast as fp32, and half of that is lost in casts
_CHECKED = 2  # steps after which the loss is compared


@dataclass(frozen=True)
class Training:
    """What both sides are given: a model's shape and weights, a batch, and whether in bf16."""

    architecture: Architecture
    weights: Mapping[str, Tensor]
    input_ids: Tensor
    labels: Tensor
    half: bool

    def job(self, model: nn.Module, loss: Callable[[], Tensor]) -> Job:
        """Return the step of a model: gradients of the loss, then AdamW by our groups."""
        return stepping(model, loss, self.half)


def stepping(model: nn.Module, loss: Callable[[], Tensor], half: bool = False) -> Job:
    """Return the step of a model: gradients of a loss, then AdamW by our groups.

    Args:
        model: it is left in training mode.
        loss: computes it.
        half: under autocast to bf16.
    """
    from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer

    model.train()
    optimizer = build_optimizer(model, OptimizerConfig())

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = loss()
        found.backward()
        optimizer.step()
        return found.detach()

    def answer() -> dict[str, Tensor]:
        # In fp32 in any case: rounded to bf16, a token now and then is routed to another expert,
        # which moves an expert's gradient by a tenth. Of bf16 the losses are compared.
        found = loss()
        found.backward()
        made = {"the loss": found.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                made[f"the gradient of {name}"] = parameter.grad.clone()
        losses = [step() for _ in range(_CHECKED)]
        made["the loss after steps"] = torch.stack(losses[1:]).float()
        return made

    def memory() -> int:
        optimizer.zero_grad()
        return temporary_bytes(lambda: (step(), ())[1], torch.device("cpu"))

    return Job(timed(step), answer, memory)


def _build(setting: Setting, folder: Path, family: Family, half: bool) -> Task:
    from moezoo_models.checkpoints.stock import predict

    if half:
        _check_worth()
    architecture = Architecture.of(family, setting.sizes)
    model = architecture.ours()
    shape = (setting["B"], setting["S"] + 1)
    ids = torch.randint(setting["V"], shape)
    parts = Training(architecture, copied(model), ids[:, :-1], ids[:, 1:].contiguous(), half)

    def loss() -> Tensor:
        found = predict(model, parts.input_ids, parts.labels).loss
        assert found is not None
        return found

    return Task(parts.job(model, loss), parts, tolerance=1e-2 if half else 2e-4)


def _transformers(parts: Training) -> Job:
    """Its model, with its loss; attention by sdpa and experts by grouped_mm."""
    model = parts.architecture.theirs(parts.weights)

    def loss() -> Tensor:
        output = model(
            input_ids=parts.input_ids,
            labels=parts.labels,
            shift_labels=parts.labels,
            use_cache=False,
        )
        found: Tensor = output.loss
        return found

    return parts.job(model, loss)


def _check_worth() -> None:
    """Skip bf16 where its products are no faster: a step would take minutes and show nothing.

    Raises:
        Unavailable: they are not.
    """
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        operands = left.to(dtype), right.to(dtype)
        samples = []
        for _ in range(6):
            start = time.perf_counter()
            multiply(*operands)
            samples.append(time.perf_counter() - start)
        seconds[dtype] = median(samples[1:])
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio < _WORTH_IT:
        raise Unavailable(f"bf16 products are {ratio:.2g}× as fast as fp32's here: nothing to gain")


_MOE = {"B": 4, "S": 256, "V": 4096, "d": 256, "L": 6, "H": 8}  # configs/moe.yaml
_DEMO = {"B": 4, "S": 256, "V": 2048, "d": 128, "L": 4, "H": 4}  # configs/demo.yaml
_QUICK = {"B": 2, "S": 8, "V": 64, "d": 32, "L": 2, "H": 2}
_KINDS: dict[str, dict[str, int]] = {
    "e8": {"E": 8, "k": 2},
    "e64": {"E": 64, "k": 8},
    "dense": {},
}


def _case(name: str, kind: str, sizes: dict[str, int], half: bool = False) -> Case:
    mixture = _KINDS[kind]
    large = sizes["V"] == 32000
    target = Target(forward=1.25 if mixture else 1.1, memory=0.6 if large else None)
    return Case(
        name,
        "end-to-end",
        f"training step{', demo' if sizes is _DEMO else ''}{', bf16-mixed' if half else ''}",
        {**sizes, **mixture},
        {**_QUICK, **({"E": 4, "k": 2} if mixture else {})},
        partial(_build, family="mixtral" if mixture else "llama", half=half),
        {"transformers": Peer(_transformers, _TRANSFORMERS, target=target)},
        unit="ms",
    )


CASES = [
    *(_case(f"train-{kind}", kind, _MOE) for kind in _KINDS),
    *(_case(f"train-demo-{kind}", kind, _DEMO) for kind in _KINDS),
    *(
        _case(f"train-{kind}-v32000", kind, {**_MOE, "B": 8, "V": 32000})
        for kind in ("e8", "dense")
    ),
    *(_case(f"train-{kind}-bf16", kind, _MOE, half=True) for kind in ("e8", "dense")),
]
