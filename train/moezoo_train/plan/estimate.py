"""Bounds on the time of a step, from a GPU's memory, arithmetic and traffic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from moezoo_train.plan.choices import Choice, choices, refusal
from moezoo_train.plan.layouts import Collective, Plan
from moezoo_train.plan.machine import Machine
from moezoo_train.plan.setup import Setup
from moezoo_train.plan.trace import Trace, trace

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
SCALE = (*(2**n for n in range(14)), 10_000)
"""Numbers of GPUs that the pictures show."""


class Bounds(NamedTuple):
    """Seconds below which a step cannot be done, were it only for one thing.

    With everything overlapped perfectly a step takes the largest; with nothing, the sum. Latencies
    are not counted, nor is what reaches less than the data sheet's peak.

    Attributes:
        compute: FLOPs of the matrix products at the peak.
        memory: bytes that a GPU must read and write in its own memory.
        network: bytes that it must send.
    """

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """The largest."""
        return max(self)

    @property
    def largest(self) -> str:
        """The name of the largest."""
        return max(self._fields, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Estimate:
    """A plan on a machine.

    Attributes:
        plan: the run in a layout.
        machine: the GPUs.
    """

    plan: Plan
    machine: Machine

    @property
    def choice(self) -> Choice:
        """The layout and its options."""
        return Choice(self.plan.layout, self.plan.expert_parallel, self.plan.replicas)

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.plan.memory().total <= self.machine.memory

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one optimizer step on all GPUs together."""
        setup = self.plan.setup
        return setup.tokens * self.plan.share * setup.accumulation * self.plan.gpus

    @property
    def flops(self) -> float:
        """FLOPs of one step on one GPU."""
        return self.plan.setup.flops_per_token * self.tokens_per_step / self.plan.gpus

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs, at most."""
        return self.tokens_per_step / self.bounds.step

    @cached_property
    def bounds(self) -> Bounds:
        """The bounds on the time of a step."""
        machine, half = self.machine, self.plan.setup.precision.half
        return Bounds(
            self.flops / (machine.half if half else machine.single),
            self.bytes_moved / machine.bandwidth,
            sum(network_seconds(one, machine) for one in self.plan.collectives()),
        )

    @property
    def bytes_moved(self) -> float:
        """Bytes that a GPU reads and writes in one step, at least.

        Parameters are read once in each pass, of experts and tables no more than the tokens touch;
        activations are written and read; gradients are written, and read by the next micro-batch
        or the optimizer, which reads and writes its state and its share of the parameters.
        """
        plan, memory, setup = self.plan, self.plan.memory(), self.plan.setup
        passes = 3 if setup.checkpointing else 2
        read = touched(setup, plan.share, plan.expert_parallel)
        weights = passes * read * setup.precision.compute.itemsize
        kept = 2 * (memory.activations + memory.weight_copies)
        micro_batch = weights + kept + 2 * memory.gradients
        owned = memory.parameters / (plan.gpus if plan.layout in ("zero1", "zero2") else 1)
        return setup.accumulation * micro_batch + 2 * (memory.optimizer + owned)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        memory, bounds = self.plan.memory(), self.bounds
        return {
            "layout": self.plan.layout,
            "gpus": self.plan.gpus,
            "expert_parallel": self.plan.expert_parallel,
            "replicas": self.plan.replicas,
            "trainer": self.choice.trainer(self.plan.gpus, self.machine.gpus_per_node),
            "padding": self.plan.padding,
            "memory_bytes": {**memory._asdict(), "total": memory.total},
            "fits": self.fits,
            "flops_per_gpu": self.flops,
            "collectives": [{**one._asdict(), "sent": one.sent} for one in self.plan.collectives()],
            "bound_seconds": {**bounds._asdict(), "step": bounds.step, "largest": bounds.largest},
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
        }


def touched(setup: Setup, share: float = 1.0, expert_parallel: int = 1) -> float:
    """Count the parameters that the tokens of a micro-batch touch on a GPU, at most.

    Where GPUs share experts, each has a part of them, and as many tokens on them as it sends away.
    """
    tokens = setup.tokens * share
    untouched = 0.0
    for total, active, shared in setup.ffn_sizes:
        here = total - shared * (1 - 1 / expert_parallel)
        untouched += total - min(here, tokens * active)
    return setup.size - untouched


def network_seconds(collective: Collective, machine: Machine) -> float:
    """Bound the time of an exchange by the links that it must take.

    Inside a node every GPU sends over its own link. A ring through several nodes leaves each node
    once and shares the node's network cards with those of other groups, so that it can be as fast
    as all cards together; of an all-to-all every GPU's own card takes what goes to other nodes.
    """
    size, node = collective.sent, machine.gpus_per_node
    if collective.group * collective.stride <= node:
        return size / machine.link
    if collective.kind == "all_to_all":
        outside = (collective.group - node) / (collective.group - 1)
        return max(size * outside / machine.network, size * (1 - outside) / machine.link)
    rings = min(collective.stride, node)
    return size / min(machine.link, machine.network * node / rings)


class Planner:
    """Plans one run in any layout, tracing it once.

    Args:
        setup: the run.
        machine: the GPUs.
        expert_parallel: GPUs that share one set of experts under ``fsdp2``; None tries all numbers.
        replicas: copies of the model under ``fsdp2``; None tries all numbers.
        cpu: attend as a CPU does.
    """

    def __init__(
        self,
        setup: Setup,
        machine: Machine,
        expert_parallel: int | None = None,
        replicas: int | None = None,
        cpu: bool = False,
    ) -> None:
        self.setup, self.machine, self.cpu = setup, machine, cpu
        self._asked = (expert_parallel, replicas)

    @property
    def fixed(self) -> bool:
        """Whether a number of ``fsdp2`` was given."""
        return any(number is not None for number in self._asked)

    def refusal(self, layout: str, gpus: int) -> str | None:
        """Return why a layout is impossible; None if it is not."""
        return refusal(self.setup, layout, gpus, *self._asked)

    def estimate(self, choice: Choice, gpus: int, share: float = 1.0) -> Estimate:
        """Plan a layout on so many GPUs, each with this share of the configured micro-batch."""
        plan = Plan(self.setup, self._trace, choice.layout, gpus, **choice.options, share=share)
        return Estimate(plan, self.machine)

    def estimates(self, layout: str, gpus: int, share: float = 1.0) -> list[Estimate]:
        """Plan a layout with all numbers that were not given; see :func:`choices`."""
        possible = choices(self.setup, layout, gpus, *self._asked)
        return [self.estimate(choice, gpus, share) for choice in possible]

    def rows(self, layout: str, gpus: int) -> list[Estimate]:
        """Plan a layout and, of ``fsdp2``, the best with shared experts, replicas and both."""
        kinds: dict[tuple[bool, bool], list[Estimate]] = {}
        for one in self.estimates(layout, gpus):
            kind = (one.plan.expert_parallel > 1, one.plan.replicas > 1)
            kinds.setdefault(kind, []).append(one)
        return [best(found) for _, found in sorted(kinds.items())]

    def scale(
        self,
        layout: str,
        global_batch_of: int | None = None,
        counts: Iterable[int] = SCALE,
        plain: bool = False,
    ) -> list[Estimate]:
        """Plan a layout on more and more GPUs, where it is possible, at its best on each number.

        Args:
            layout: the layout.
            global_batch_of: hold the global batch of so many GPUs, as long as there is a window for
                each; None gives every GPU the configured micro-batch.
            counts: numbers of GPUs.
            plain: without replicas, and without sharing experts.
        """
        found = []
        for gpus in counts:
            share = 1.0 if global_batch_of is None else global_batch_of / gpus
            if share * self.setup.batch_size < 1:
                continue
            if plain:
                found.append(self.estimate(Choice(layout), gpus, share))
            elif estimates := self.estimates(layout, gpus, share):
                found.append(best(estimates))
        return found

    @cached_property
    def _trace(self) -> Trace:
        return trace(self.setup, cpu=self.cpu)


def best(estimates: Iterable[Estimate]) -> Estimate:
    """Return the one of the highest bound on speed that fits, or if none does, of least memory.

    Of equal bounds, the one whose other bounds are lowest, as nothing overlaps perfectly.
    """

    def rank(one: Estimate) -> tuple[bool, float, float]:
        memory = one.plan.memory().total
        return one.fits, one.tokens_per_second if one.fits else -memory, -sum(one.bounds)

    return max(estimates, key=rank)
