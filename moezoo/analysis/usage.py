"""The load of a layer's experts, values, leaves or neurons over many forward passes.

Each is a *slot*. Its share is measured by weight (what it was given after the softmax; ``_w`` in
Lample et al. 2019, arXiv:1907.05242, section 4.4), by choices (how often it was chosen, ``_u``),
and where choices are ranked also by first choices: a memory that reads 32 values per head may use
every value while a few always come first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from moezoo.analysis.watching import Context, watch
from moezoo.experts.memory import KeyValueMemory
from moezoo.feed_forward import FeedForward
from moezoo.routing.stats import SlotLoad, max_violation, slot_usage


@dataclass(frozen=True)
class Evenness:
    """The balance of the load of N slots.

    Attributes:
        usage: share of the slots with any load.
        unevenness: ``KL(share || uniform)`` in nats: 0 when even, log N when one slot has it all.
        gini: Gini coefficient: 0 when even, 1 - 1/N when one slot has it all.
        top50: the fewest slots that hold half of the load.
        top90: ... that hold 90 %.
        top99: ... that hold 99 %.
        max_violation: MaxVio, the largest load over the mean, less 1 (arXiv:2408.15664, eq. 4).
        dead: slots without any load.
    """

    usage: float
    unevenness: float
    gini: float
    top50: int
    top90: int
    top99: int
    max_violation: float
    dead: int


@dataclass(frozen=True)
class SlotUsage:
    """The usage of one layer's slots.

    Attributes:
        kind: what they are: experts, leaves, values, neurons.
        shape: how they are laid out; ``(n, n)`` for product keys.
        num_slots: their number N.
        by_weight: how evenly they share the weight.
        by_choice: how evenly they share the choices.
        by_first_choice: how evenly they share the first choices; None where there is no first.
    """

    kind: str
    shape: tuple[int, ...]
    num_slots: int
    by_weight: Evenness
    by_choice: Evenness
    by_first_choice: Evenness | None

    def measures(self) -> dict[str, Evenness]:
        """Return what was measured, by name: weight, choice and perhaps first choice."""
        named = {"weight": self.by_weight, "choice": self.by_choice}
        if self.by_first_choice is not None:
            named["first choice"] = self.by_first_choice
        return named

    def as_row(self) -> dict[str, Any]:
        """Flatten to one row; columns end in ``_w``, ``_u`` and, for first choices, ``_first``."""
        row: dict[str, Any] = {"kind": self.kind, "num_slots": self.num_slots}
        for (_, evenness), end in zip(self.measures().items(), ("w", "u", "first"), strict=False):
            row |= {f"{name}_{end}": value for name, value in asdict(evenness).items()}
        return row


def routed_layers(model: nn.Module) -> dict[str, FeedForward]:
    """Find the layers that choose among slots, in any model, by their names in it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FeedForward) and module.has_slots
    }


@contextmanager
def collect_loads(layers: Mapping[str, FeedForward]) -> Iterator[dict[str, SlotLoad]]:
    """Sum up the load of each slot over the forward passes inside the block::

        layers = routed_layers(model)
        with torch.no_grad(), collect_loads(layers) as loads:
            for batch in batches:
                model(batch)
        usage = {name: usage_of(load) for name, load in loads.items()}

    Every layer routes a second time for this, so a pass takes longer. Sums are fp64, on the CPU.

    Args:
        layers: by name, in evaluation mode.

    Yields:
        The sums so far by the layers' names, which grow with each pass.

    Raises:
        InputError: a layer is in training mode, where it may choose differently each time.
    """
    loads: dict[str, SlotLoad] = {}

    def see(name: str, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        load = layer.slot_load(hidden, **context)
        if load is not None:
            loads[name] = add_loads(loads[name], load) if name in loads else _exact(load)

    with watch(layers, see):
        yield loads


def _exact(load: SlotLoad) -> SlotLoad:
    best = None if load.best is None else load.best.cpu()
    return load._replace(counts=load.counts.cpu(), mass=load.mass.cpu().double(), best=best)


def add_loads(one: SlotLoad, other: SlotLoad) -> SlotLoad:
    """Add the loads of two passes of one layer, or of two layers that share their slots.

    Returns:
        The sums, on the CPU; ``mass`` in fp64, ``best`` None unless both have it.
    """
    one, other = _exact(one), _exact(other)
    best = None if one.best is None or other.best is None else one.best + other.best
    return one._replace(counts=one.counts + other.counts, mass=one.mass + other.mass, best=best)


def usage_of(load: SlotLoad) -> SlotUsage:
    """Return the usage of a layer's slots, from its :meth:`~moezoo.FeedForward.slot_load`."""
    return SlotUsage(
        kind=load.kind,
        shape=load.shape,
        num_slots=load.counts.numel(),
        by_weight=_evenness(load.mass),
        by_choice=_evenness(load.counts),
        by_first_choice=None if load.best is None else _evenness(load.best),
    )


def _evenness(weight_N: Tensor) -> Evenness:
    weight_N = weight_N.double()
    figures: dict[str, Any] = {name: value.item() for name, value in slot_usage(weight_N).items()}
    return Evenness(
        **figures,
        max_violation=max_violation(weight_N).item(),
        dead=int((weight_N == 0).sum()),
    )


def layers_by_pool(layers: Mapping[str, FeedForward]) -> list[list[str]]:
    """List the layers that read the same table of values, for each table that several read."""
    readers: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        memory = getattr(layer, "memory", None)
        if isinstance(memory, KeyValueMemory):
            readers[id(memory.table)].append(name)
    return [names for names in readers.values() if len(names) > 1]
