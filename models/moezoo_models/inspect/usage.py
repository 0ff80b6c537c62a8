"""Measuring how evenly a model uses its experts, values, leaves and neurons on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.collision_picture import draw_collisions
from moezoo.analysis.collisions import Collisions, collect_collisions
from moezoo.analysis.heat_map import draw_usage
from moezoo.analysis.usage import (
    Evenness,
    SlotUsage,
    add_loads,
    collect_loads,
    layers_by_pool,
    usage_of,
)
from moezoo.command.tables import print_table
from moezoo.routing.stats import SlotLoad
from moezoo_models.inspect.common import (
    Findings,
    Stream,
    check_routed,
    passes,
    routed_by_name,
)
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating


@dataclass(frozen=True)
class ModelUsage(Findings):
    """How a model's layers used their slots on a text.

    Attributes:
        loads: counts and weights of each slot, by the layer's name. A table of values that several
            layers share follows as ``layers 1 + 3``, summed over them.
        usages: the summaries of these loads.
        collisions: of layers that hash, by name and by what is hashed.
    """

    loads: dict[str, SlotLoad]
    usages: dict[str, SlotUsage]
    collisions: dict[str, dict[str, Collisions]]


def inspect_usage(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/usage",
    **reading: Any,
) -> ModelUsage:
    """Print and draw how evenly a checkpoint's model uses its experts, values, leaves and neurons.

    The text is cut into windows; every token passes the model once, and what each layer would
    give its slots is added up: the weights (after the softmax), the choices, and first choices
    where they are ranked. Written to the output directory: usage.json and usage.csv with the
    figures of the table, usage.png, a heat map, and usage.safetensors with the sum of every slot;
    where layers hash tokens or n-grams, also what shares a slot, in usage.json and collisions.png.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The usage of each layer, as it is written.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or has
            no layer that chooses; an option is out of range; the output cannot be written.
    """
    inspection = open_inspection(
        checkpoint, text, output, partial(check_routed, checkpoint=checkpoint), **reading
    )
    usage = count_usage(inspection.model, inspection.tokens, **inspection.windows)
    _print(usage, inspection)
    _write(usage, inspection)
    return usage


@torch.no_grad()
def count_usage(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> ModelUsage:
    """Count how a model in memory uses its slots on tokens; see :func:`inspect_usage`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        sequence_length: as for :func:`inspect_usage`.
        batch_size: as there.

    Raises:
        InputError: there are no tokens, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    layers = routed_by_name(model)
    with (
        evaluating(model),
        collect_loads(layers) as loads,
        collect_collisions(layers) as counters,
    ):
        for _ in passes(model, stream):
            pass
    methods = {name: type(layer).__name__ for name, layer in layers.items()}
    for readers in layers_by_pool(layers):
        name = "layers " + " + ".join(reader.removeprefix("layer ") for reader in readers)
        methods[name] = "shared values"
        total = loads[readers[0]]
        for reader in readers[1:]:
            total = add_loads(total, loads[reader])
        loads[name] = total
    usages = {name: usage_of(load) for name, load in loads.items()}
    collisions = {
        name: {what: counter.collisions() for what, counter in own.items()}
        for name, own in counters.items()
    }
    return ModelUsage(
        len(stream.tokens), stream.sequence_length, methods, loads, usages, collisions
    )


def _print(usage: ModelUsage, inspection: Inspection) -> None:
    columns = ["layer", "method", ">slots", "by", ">usage", ">KL", ">Gini"]
    columns += [">top50", ">top90", ">top99", ">MaxVio", ">dead"]
    rows = []
    for name, summary in usage.usages.items():
        head = [name.split(" ", 1)[1], usage.methods[name], f"{summary.num_slots:,}"]
        for measure, figures in _distinct(summary).items():
            rows.append([*head, measure, *_cells(figures)])
            head = ["", "", ""]
    title = f"{inspection.title} in windows of {usage.sequence_length:,}"
    print_table(title, columns, rows)
    if usage.collisions:
        _print_collisions(usage)


def _print_collisions(usage: ModelUsage) -> None:
    columns = ["layer", "hash of", ">different", ">slots", ">foreign", ">by chance", ">pairs"]
    columns += [">hashes", ">foreign to all", ">pairs in all"]
    rows = [
        [
            name.split(" ", 1)[1],
            what,
            f"{each.owners:,}",
            f"{each.slots:,}",
            f"{each.foreign:.2%}",
            f"{each.by_chance:.2%}",
            f"{each.pairs:,.0f}",
            f"{each.hashes:,}",
            f"{each.foreign_of_all:.2%}",
            f"{each.pairs_of_all:,}",
        ]
        for name, own in usage.collisions.items()
        for what, each in own.items()
    ]
    print_table("What is hashed, and shares a slot", columns, rows)


def _distinct(summary: SlotUsage) -> dict[str, Evenness]:
    """Leave out measures equal to the line above, as for layers without weights."""
    distinct: dict[str, Evenness] = {}
    for measure, figures in summary.measures().items():
        if figures not in distinct.values():
            distinct[measure] = figures
    return distinct


def _cells(figures: Evenness) -> list[str]:
    return [
        f"{figures.usage:.2%}",
        f"{figures.unevenness:.3f}",
        f"{figures.gini:.3f}",
        f"{figures.top50:,}",
        f"{figures.top90:,}",
        f"{figures.top99:,}",
        f"{figures.max_violation:.2f}",
        f"{figures.dead:,}",
    ]


def _write(usage: ModelUsage, inspection: Inspection) -> None:
    layers = [
        {"layer": name, "method": usage.methods[name], **asdict(summary)}
        for name, summary in usage.usages.items()
    ]
    collisions = {
        f"{name}, {what}": each
        for name, own in usage.collisions.items()
        for what, each in own.items()
    }
    report = {
        "sequence_length": usage.sequence_length,
        "layers": layers,
        "collisions": {name: asdict(each) for name, each in collisions.items()},
    }
    rows = [
        {"layer": name, "method": usage.methods[name], **summary.as_row()}
        for name, summary in usage.usages.items()
    ]
    title = f"{inspection.checkpoint}: usage over {usage.tokens:,} tokens"
    figures = {"usage": draw_usage(usage.loads, title)}
    if collisions:
        shared = f"{inspection.checkpoint}: what shares a slot, over {usage.tokens:,} tokens"
        figures["collisions"] = draw_collisions(collisions, shared)
    inspection.write("usage", report, rows, figures, _tensors(usage))


def _tensors(usage: ModelUsage) -> dict[str, Tensor]:
    """Name the sums of every slot ``layer 3.weight``, ``layer 3.choice``, …, in their shape."""
    tensors = {}
    for name, load in usage.loads.items():
        sums = {"weight": load.mass, "choice": load.counts, "first choice": load.best}
        for measure, values in sums.items():
            if values is not None:
                tensors[f"{name}.{measure}"] = values.reshape(load.shape).contiguous()
    return tensors
