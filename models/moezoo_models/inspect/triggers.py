"""Looking at a checkpoint: its neurons' triggers, and the tokens that they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.curves import draw_agreement
from moezoo.analysis.neurons import Neurons
from moezoo.analysis.triggers import Agreement, Sayings, TriggerKeeper, agreement, sayings
from moezoo.analysis.watching import Context, watch
from moezoo.command.tables import print_table
from moezoo.errors import check_int
from moezoo.feed_forward import FeedForward
from moezoo_models.inspect.common import (
    Stream,
    blocks_by_name,
    full_name,
    neuron_sets,
    passes,
    show,
)
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating
from moezoo_models.text.tokenizer import Tokenizer

_CONTEXT = 16  # tokens shown of a trigger


@dataclass(frozen=True)
class NeuronTriggers:
    """The triggers of one set of neurons, and the tokens that they say.

    Attributes:
        method: class of the layer.
        neurons: the set.
        coefficients: ``(N, K)`` fp32, the largest of each neuron, descending.
        positions: ``(N, K)`` int64, the places in the text of the tokens that gave them, or -1.
        says: the tokens that the values say, and the ranks of those after the strongest triggers.
        agreement: how often these are the token that the neuron says.
    """

    method: str
    neurons: Neurons
    coefficients: Tensor
    positions: Tensor
    says: Sayings
    agreement: Agreement

    def strength(self) -> Tensor:
        """Return the largest coefficient times the length of the value, ``(N,)``; at least 0."""
        return self.coefficients[:, 0].clamp(min=0.0) * self.says.lengths


def inspect_triggers(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/triggers",
    neurons: int = 32,
    triggers: int = 5,
    top_tokens: int = 10,
    **reading: Any,
) -> dict[str, NeuronTriggers]:
    """Print and draw what triggers a checkpoint's neurons and values, and which tokens they say.

    Every token of the text passes the model once, and the places where each neuron's coefficient
    was largest are kept. Written to the output directory: triggers.json and triggers.csv with the
    strongest neurons of every layer, their triggers and the tokens that their values promote;
    triggers.png; and triggers.safetensors with the triggers of all neurons.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        neurons: neurons listed for a layer: those that write most at their strongest trigger.
        triggers: triggers kept of a neuron.
        top_tokens: tokens listed of those that a value says.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The triggers by the name of a set of neurons: ``layer 3``, or ``layer 3, shared expert``.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or has
            no feed-forward layer; an option is out of range; the output cannot be written.
    """
    check_int("neurons", neurons)
    check_int("triggers", triggers)
    check_int("top_tokens", top_tokens)
    inspection = open_inspection(checkpoint, text, output, neuron_sets, **reading)
    tokens, words = inspection.tokens, inspection.tokenizer
    found = find_triggers(
        inspection.model, tokens, triggers=triggers, top_tokens=top_tokens, **inspection.windows
    )
    listed = {name: _listed(one, tokens, words, neurons) for name, one in found.items()}
    _print(found, listed, inspection.title)
    _write(found, listed, inspection)
    return found


def find_triggers(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    triggers: int = 5,
    top_tokens: int = 10,
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> dict[str, NeuronTriggers]:
    """Find the triggers of a model in memory; see :func:`inspect_triggers`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        triggers: as for :func:`inspect_triggers`.
        top_tokens: as there.
        sequence_length: as there.
        batch_size: as there.

    Raises:
        InputError: there are no tokens or no feed-forward layers, an option is out of range, or a
            token id is outside the model's vocabulary.
    """
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    sets, layers = neuron_sets(model), blocks_by_name(model)
    keepers = {
        name: [TriggerKeeper(neurons.number, triggers) for neurons in parts]
        for name, parts in sets.items()
    }
    start = 0

    def see(name: str, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        for neurons, keeper in zip(sets[name], keepers[name], strict=True):
            keeper.add(neurons.read(hidden, context), start)

    with evaluating(model), watch(layers, see):
        for begin, batch in passes(model, stream):
            start = begin + len(batch)
    # The token after the last is not known.
    following = torch.cat([stream.tokens[1:], torch.tensor([-1])])
    found = {}
    for name, parts in sets.items():
        for neurons, keeper in zip(parts, keepers[name], strict=True):
            first = keeper.positions[:, 0]
            triggered = keeper.coefficients[:, 0] > 0
            asked = following[first.clamp(min=0)].masked_fill(~triggered, -1)
            says = sayings(
                neurons.values,
                torch.arange(neurons.number),
                model.lm_head.weight,
                asked,
                top_tokens,
            )
            found[full_name(name, neurons)] = NeuronTriggers(
                type(layers[name]).__name__,
                neurons,
                keeper.coefficients,
                keeper.positions,
                says,
                agreement(says.tokens[:, 0], asked, says.ranks),
            )
    return found


def _listed(
    found: NeuronTriggers, tokens: Sequence[int], tokenizer: Tokenizer, neurons: int
) -> list[dict[str, Any]]:
    """Describe the neurons that write most."""
    strength = found.strength()
    best = strength.topk(min(neurons, len(strength)))
    return [
        {
            "neuron": found.neurons.label(neuron),
            "number": neuron,
            "strength": written,
            "says": [
                {"text": show(tokenizer.decode([token])), "token": token, "probability": p}
                for token, p in zip(
                    found.says.tokens[neuron].tolist(),
                    found.says.probabilities[neuron].tolist(),
                    strict=True,
                )
            ],
            "triggers": [
                _trigger(tokens, position, coefficient, tokenizer)
                for position, coefficient in zip(
                    found.positions[neuron].tolist(),
                    found.coefficients[neuron].tolist(),
                    strict=True,
                )
                if position >= 0
            ],
        }
        for written, neuron in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _trigger(
    tokens: Sequence[int], position: int, coefficient: float, tokenizer: Tokenizer
) -> dict[str, Any]:
    context = list(tokens[max(position + 1 - _CONTEXT, 0) : position + 1])
    after = list(tokens[position + 1 : position + 2])
    return {
        "position": position,
        "coefficient": coefficient,
        "text": show(tokenizer.decode(context), 72),
        "next": show(tokenizer.decode(after)) if after else None,
    }


def _print(
    found: Mapping[str, NeuronTriggers], listed: Mapping[str, list[dict[str, Any]]], title: str
) -> None:
    columns = ["layer", "method", ">neurons", ">agree", ">by chance", ">median rank"]
    columns += ["strongest", "is triggered by", "says"]
    rows = []
    for name, one in found.items():
        figures, best = one.agreement, listed[name][0]
        triggers = best["triggers"]
        rows.append(
            [
                name.removeprefix("layer "),
                one.method,
                f"{one.neurons.number:,}",
                f"{figures.agree:.2%}",
                f"{figures.by_chance:.2%}",
                f"{figures.median_rank:,.0f}",
                best["neuron"],
                f"'{show(triggers[0]['text'])}'" if triggers else "nothing",
                " ".join(f"'{word['text']}'" for word in best["says"][:3]),
            ]
        )
    print_table(title, columns, rows)


def _write(
    found: Mapping[str, NeuronTriggers],
    listed: Mapping[str, list[dict[str, Any]]],
    inspection: Inspection,
) -> None:
    layers = [
        {
            "layer": name,
            "method": one.method,
            "num_neurons": one.neurons.number,
            "agreement": asdict(one.agreement),
            "neurons": listed[name],
        }
        for name, one in found.items()
    ]
    rows = [
        {
            "layer": name,
            "neuron": neuron["neuron"],
            "strength": neuron["strength"],
            "says": " ".join(f"'{word['text']}'" for word in neuron["says"]),
            "triggers": " | ".join(trigger["text"] for trigger in neuron["triggers"]),
        }
        for name, neurons in listed.items()
        for neuron in neurons
    ]
    tensors = {}
    for name, one in found.items():
        tensors[f"{name}.coefficients"] = one.coefficients
        tensors[f"{name}.positions"] = one.positions
        tensors[f"{name}.says"] = one.says.tokens
    figure = draw_agreement(
        {name: one.agreement for name, one in found.items()},
        {name: one.strength() for name, one in found.items()},
        {name: f"{name}: {one.method}" for name, one in found.items()},
        f"Triggers: {inspection.source}",
    )
    inspection.write("triggers", {"layers": layers}, rows, {"triggers": figure}, tensors)
