"""Looking at a checkpoint: how few of its neurons are active on a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.curves import draw_sparsity
from moezoo.analysis.sparsity import Sparsity, SparsityCounter
from moezoo.analysis.watching import Context, token_mask, watch
from moezoo.command.tables import print_table
from moezoo.errors import check_number
from moezoo.feed_forward import FeedForward
from moezoo_models.inspect.common import (
    Findings,
    Stream,
    blocks_by_name,
    full_name,
    neuron_sets,
    passes,
)
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating


@dataclass(frozen=True)
class ModelSparsity(Findings):
    """How sparse a model's activations are on a text.

    Attributes:
        threshold: share of a token's largest activation from which one is strong.
        summaries: the shares, by the name of a set of neurons: ``layer 3``, or
            ``layer 3, shared expert``. These are also the names in ``methods``.
        nonzero: ``(N,)`` int64, how often each neuron was not zero.
        strong: ``(N,)`` int64, how often it was strong.
    """

    threshold: float
    summaries: dict[str, Sparsity]
    nonzero: dict[str, Tensor]
    strong: dict[str, Tensor]


def inspect_sparsity(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/sparsity",
    threshold: float = 0.01,
    **reading: Any,
) -> ModelSparsity:
    """Print and draw how few of a checkpoint's neurons are active on a token, layer by layer.

    Every token of the text passes the model once. Written to the output directory: sparsity.json
    and sparsity.csv with the figures of the table, sparsity.png, and sparsity.safetensors with
    how often each neuron was not zero, and strong.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        threshold: share of a token's largest activation from which one is strong.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The sparsity of each layer, as it is written.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or has
            no feed-forward layer; an option is out of range; the output cannot be written.
    """
    check_number("threshold", threshold, maximum=1.0)
    inspection = open_inspection(checkpoint, text, output, neuron_sets, **reading)
    found = measure_sparsity(
        inspection.model, inspection.tokens, threshold=threshold, **inspection.windows
    )
    _print(found, inspection)
    _write(found, inspection)
    return found


def measure_sparsity(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    threshold: float = 0.01,
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> ModelSparsity:
    """Measure a model in memory on tokens; see :func:`inspect_sparsity`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        threshold: as for :func:`inspect_sparsity`.
        sequence_length: as there.
        batch_size: as there.

    Raises:
        InputError: there are no tokens or no feed-forward layers, an option is out of range, or a
            token id is outside the model's vocabulary.
    """
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    sets = neuron_sets(model)
    counters = {
        name: [SparsityCounter(neurons.number, threshold) for neurons in parts]
        for name, parts in sets.items()
    }

    def see(name: str, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        real = int(token_mask(hidden, context).sum())
        for neurons, counter in zip(sets[name], counters[name], strict=True):
            counter.add(neurons.read(hidden, context), real)

    layers = blocks_by_name(model)
    with evaluating(model), watch(layers, see):
        for _ in passes(model, stream):
            pass
    named = {
        full_name(name, neurons): (type(layers[name]).__name__, counter)
        for name, parts in sets.items()
        for neurons, counter in zip(parts, counters[name], strict=True)
    }
    return ModelSparsity(
        tokens=len(stream.tokens),
        sequence_length=stream.sequence_length,
        threshold=threshold,
        methods={name: method for name, (method, _) in named.items()},
        summaries={name: counter.summary() for name, (_, counter) in named.items()},
        nonzero={name: counter.nonzero for name, (_, counter) in named.items()},
        strong={name: counter.strong for name, (_, counter) in named.items()},
    )


def _print(found: ModelSparsity, inspection: Inspection) -> None:
    columns = ["layer", "method", ">neurons", ">computed", ">nonzero", ">strong", ">effective"]
    columns += [">dead", ">median neuron", ">most active", ">Gini"]
    rows = []
    for name, summary in found.summaries.items():
        shares = (summary.computed, summary.nonzero, summary.strong, summary.effective)
        over_neurons = (summary.dead, summary.frequency_50, summary.frequency_most)
        rows.append(
            [
                name.removeprefix("layer "),
                found.methods[name],
                f"{summary.neurons:,}",
                *(f"{share:.2%}" for share in (*shares, *over_neurons)),
                f"{summary.gini:.3f}",
            ]
        )
    title = f"{inspection.title} in windows of {found.sequence_length:,}; "
    print_table(f"{title}strong: over {found.threshold:g} of the token's largest", columns, rows)


def _write(found: ModelSparsity, inspection: Inspection) -> None:
    rows = [
        {"layer": name, "method": found.methods[name], **asdict(summary)}
        for name, summary in found.summaries.items()
    ]
    report = {
        "sequence_length": found.sequence_length,
        "threshold": found.threshold,
        "layers": rows,
    }
    figure = draw_sparsity(
        found.summaries,
        {name: strong / found.tokens for name, strong in found.strong.items()},
        {name: f"{name}: {found.methods[name]}" for name in found.summaries},
        f"Sparsity: {inspection.source}",
    )
    tensors = {f"{name}.nonzero": counts for name, counts in found.nonzero.items()}
    tensors |= {f"{name}.strong": counts for name, counts in found.strong.items()}
    inspection.write("sparsity", report, rows, {"sparsity": figure}, tensors)
