"""The layouts that `moezoo fit` can run on so many GPUs, and the options that ask for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moezoo.errors import InputError, check_choice
from moezoo_train.plan.layouts import LAYOUTS, ZERO
from moezoo_train.plan.setup import Setup

STRATEGY = "moezoo_train.parallel.fsdp2.FSDP2Strategy"


class Choice(NamedTuple):
    """A strategy of the trainer, and its options.

    Attributes:
        layout: a key of :data:`moezoo_train.plan.layouts.LAYOUTS`.
        expert_parallel: GPUs that share one set of experts.
        replicas: copies of the model.
    """

    layout: str
    expert_parallel: int = 1
    replicas: int = 1

    @property
    def label(self) -> str:
        """E.g. ``fsdp2, expert_parallel 8, replicas 2``."""
        parts = [f"{name} {number}" for name, number in self.options.items() if number > 1]
        return ", ".join([self.layout, *parts])

    @property
    def options(self) -> dict[str, int]:
        """The numbers that the strategy takes."""
        return {"expert_parallel": self.expert_parallel, "replicas": self.replicas}

    def trainer(self, gpus: int, gpus_per_node: int) -> dict[str, Any]:
        """Return the trainer's options that give this layout."""
        devices = max(n for n in range(1, min(gpus, gpus_per_node) + 1) if gpus % n == 0)
        own = {name: number for name, number in self.options.items() if number > 1}
        strategy = {"class_path": STRATEGY, "init_args": own} if own else self.layout
        return {"devices": devices, "num_nodes": gpus // devices, "strategy": strategy}


def yaml_lines(trainer: dict[str, Any]) -> list[str]:
    """Write the trainer's options as YAML, one line each."""
    lines = ["trainer:", f"  devices: {trainer['devices']}", f"  num_nodes: {trainer['num_nodes']}"]
    strategy = trainer["strategy"]
    if isinstance(strategy, str):
        return [*lines, f"  strategy: {strategy}"]
    numbers = ", ".join(f"{name}: {number}" for name, number in strategy["init_args"].items())
    return [
        *lines,
        "  strategy:",
        f"    class_path: {strategy['class_path']}",
        f"    init_args: {{{numbers}}}",
    ]


def refusal(
    setup: Setup,
    layout: str,
    gpus: int,
    expert_parallel: int | None = None,
    replicas: int | None = None,
) -> str | None:
    """Return why a layout is impossible; None if it is not.

    Args:
        setup: the run.
        layout: a key of :data:`LAYOUTS`.
        gpus: how many.
        expert_parallel: what was asked for; None: any.
        replicas: what was asked for; None: any.
    """
    if layout in ZERO:
        return setup.zero_refused
    if layout != "fsdp2":
        return None
    experts, copies = expert_parallel or 1, replicas or 1
    if experts > 1:
        if not setup.expert_layers:
            return "expert_parallel: no layer has routed experts; leave it out"
        if setup.tables:
            named = " and ".join(setup.tables)
            return f"expert_parallel: there is no formula for sharing {named}; leave it out"
        for layer in setup.expert_layers:
            if layer.experts.num_experts % experts:
                return (
                    f"expert_parallel: {experts} does not divide {layer.experts.num_experts} "
                    "experts; change it"
                )
    if gpus % (experts * copies):
        return (
            f"expert_parallel {experts} × replicas {copies} does not divide {gpus} GPUs; "
            "change them"
        )
    return None


def choices(
    setup: Setup,
    layout: str,
    gpus: int,
    expert_parallel: int | None = None,
    replicas: int | None = None,
) -> list[Choice]:
    """List the ways to run a layout, all possible numbers in place of those that are None.

    As many replicas as GPUs are left out: ``ddp`` does that with less. The result is empty where
    :func:`refusal` says why.
    """
    if refusal(setup, layout, gpus, expert_parallel, replicas) is not None:
        return []
    if layout != "fsdp2":
        return [Choice(layout)]
    shares = [expert_parallel] if expert_parallel else _shares(setup, gpus // (replicas or 1))
    found = []
    for share in shares:
        for copies in [replicas] if replicas else _divisors(gpus // share):
            if replicas or copies == 1 or copies < gpus:
                found.append(Choice(layout, share, copies))
    return found


def _shares(setup: Setup, gpus: int) -> list[int]:
    """Return every number of GPUs that can share the experts."""
    counts = [layer.experts.num_experts for layer in setup.expert_layers]
    return _divisors(math.gcd(gpus, *counts)) if counts and not setup.tables else [1]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_layouts(text: str, numbers: Sequence[str] = ()) -> list[str]:
    """Split and check ``ddp,fsdp2``.

    Args:
        text: what was given.
        numbers: names of the options of ``fsdp2`` that were given.

    Raises:
        InputError: one of them is not known, or the numbers are of none of them.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"layout: none is given; choose from: {', '.join(LAYOUTS)}")
    if "ep" in names:
        raise InputError("layout: 'ep' is not known; give fsdp2 with --expert_parallel")
    found = list(dict.fromkeys(check_choice("layout", name, LAYOUTS) for name in names))
    for name in numbers:
        if "fsdp2" not in found:
            raise InputError(f"{name}: only fsdp2 takes it; add fsdp2 to --layout, or leave it out")
    return found
