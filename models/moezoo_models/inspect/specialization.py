"""Looking at a checkpoint: do its experts, values and neurons specialise in tokens?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.choices import SlotChoices, slot_choices
from moezoo.analysis.paths import Paths
from moezoo.analysis.specialization import (
    Specialization,
    count_pairs,
    entropy,
    information_terms,
    occurrence_entropy,
    specialization,
)
from moezoo.analysis.token_map import draw_paths, draw_tokens
from moezoo.analysis.watching import Context, watch
from moezoo.command.tables import print_table
from moezoo.errors import check_int
from moezoo.feed_forward import FeedForward
from moezoo_models.inspect.common import (
    Findings,
    Stream,
    check_routed,
    passes,
    routed_by_name,
    show,
)
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating
from moezoo_models.text.tokenizer import Tokenizer

MOST_CELLS = 2**26
"""Counts kept for all layers together, 256 MiB; rarer tokens are counted as one beyond it."""

_OTHERS = "(all rarer tokens)"
_MOST_WAYS = 50


@dataclass(frozen=True)
class ModelSpecialization(Findings):
    """Which slots the tokens of a text chose.

    Attributes:
        kinds: each layer's kind of slots: experts, leaves, values or neurons.
        token_ids: ``(V,)`` int64, the tokens that are told apart, the most frequent first; -1 at
            the end stands for all others, if there are any.
        counts: ``(V, N)`` int32 by layer: how often each token chose each slot.
        layers: the summaries of these.
        paths: tables of pairs of slots in consecutive layers, and whole ways.
        between: the summaries of these tables.
    """

    kinds: dict[str, str]
    token_ids: Tensor
    counts: dict[str, Tensor]
    layers: dict[str, Specialization]
    paths: Paths
    between: dict[tuple[str, str], Specialization]


def inspect_experts(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/experts",
    top_tokens: int = 10,
    slots: int = 64,
    **reading: Any,
) -> ModelSpecialization:
    """Print and draw which tokens are routed to which experts, and the paths between layers.

    Every token of the text passes the model once, and it is counted which token chose which expert,
    value, leaf or neuron (slot). Written to the output directory: experts.json and experts.csv with
    the strongest tokens of every slot, experts.png and paths.png, heat maps, and
    experts.safetensors with all counts.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        top_tokens: tokens listed for a slot.
        slots: slots listed for a layer, the most used ones.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The counts and their summaries.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or has
            no layer that chooses; an option is out of range; the output cannot be written.
    """
    check_int("top_tokens", top_tokens)
    check_int("slots", slots)
    inspection = open_inspection(
        checkpoint, text, output, partial(check_routed, checkpoint=checkpoint), **reading
    )
    found = count_choices(inspection.model, inspection.tokens, **inspection.windows)
    readable = _readable(found.token_ids, inspection.tokenizer)
    listed = {name: _listed(found, name, readable, slots, top_tokens) for name in found.counts}
    _print(found, listed, inspection)
    _write(found, listed, readable, inspection)
    return found


def count_choices(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    most_cells: int = MOST_CELLS,
) -> ModelSpecialization:
    """Count which slots the tokens choose in a model in memory; see :func:`inspect_experts`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        sequence_length: as for :func:`inspect_experts`.
        batch_size: as there.
        most_cells: counts kept for all layers together, of 4 bytes each.

    Raises:
        InputError: there are no tokens, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    layers = routed_by_name(model)
    seen: dict[str, SlotChoices] = {}

    def see(name: str, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        choices = slot_choices(layer, hidden, context)
        seen[name] = choices._replace(indices=choices.indices.cpu(), weights=choices.weights.cpu())

    counter: _Counter | None = None
    with evaluating(model), watch(layers, see):
        for _, batch in passes(model, stream):
            counter = counter or _Counter(stream.tokens, seen, most_cells)
            counter.add(batch, seen)
    assert counter is not None
    return ModelSpecialization(
        tokens=len(stream.tokens),
        sequence_length=stream.sequence_length,
        methods={name: type(layer).__name__ for name, layer in layers.items()},
        kinds={name: choices.kind for name, choices in seen.items()},
        token_ids=counter.token_ids,
        counts=counter.counts,
        layers={
            name: specialization(counts, counter.occurrence[name])
            for name, counts in counter.counts.items()
        },
        paths=counter.paths,
        between={pair: specialization(t, 0.0) for pair, t in counter.paths.tables.items()},
    )


class _Counter:
    """Tables of tokens and slots, filled batch by batch."""

    def __init__(self, tokens: Tensor, first: Mapping[str, SlotChoices], most_cells: int) -> None:
        sizes = {name: choices.num_slots for name, choices in first.items()}
        ids, times = tokens.unique(return_counts=True)
        room = max(most_cells // sum(sizes.values()), 2)
        kept = ids[times.argsort(descending=True, stable=True)[:room]]
        if len(kept) < len(ids):
            kept = torch.cat([kept[:-1], torch.tensor([-1])])
        self.token_ids = kept
        # The row of each token; what is not kept goes to the last.
        self.rows = torch.full((int(ids.max()) + 1,), len(kept) - 1)
        real = kept[kept >= 0]
        self.rows[real] = torch.arange(len(real))
        self.counts = {
            name: torch.zeros(len(kept), size, dtype=torch.int32) for name, size in sizes.items()
        }
        self.occurrence = dict.fromkeys(sizes, 0.0)
        self.paths = Paths(sizes)

    def add(self, tokens: Tensor, choices: Mapping[str, SlotChoices]) -> None:
        rows = self.rows[tokens]
        for name, chosen in choices.items():
            indices = chosen.indices[: len(tokens)]
            count_pairs(self.counts[name], rows, indices)
            self.occurrence[name] += float(occurrence_entropy(indices))
        self.paths.add({name: c.heaviest()[: len(tokens)] for name, c in choices.items()})


def _readable(token_ids: Tensor, tokenizer: Tokenizer) -> list[str]:
    return [_OTHERS if i < 0 else show(tokenizer.decode([i])) for i in token_ids.tolist()]


def _listed(
    found: ModelSpecialization, name: str, readable: list[str], slots: int, top: int
) -> list[dict[str, Any]]:
    """Describe the most used slots of a layer by the tokens that carry their information."""
    counts_VN = found.counts[name]
    terms_VN = information_terms(counts_VN)
    used_N, times_V = counts_VN.sum(dim=0), counts_VN.sum(dim=1)
    described = []
    for slot in used_N.topk(min(slots, len(used_N))).indices.tolist():
        terms_V, rows = terms_VN[:, slot], []
        for row in terms_V.topk(min(top, len(terms_V))).indices.tolist():
            times = int(counts_VN[row, slot])
            if times and terms_V[row] > 0:
                share = times / int(times_V[row])
                rows.append(
                    {
                        "token": int(found.token_ids[row]),
                        "text": readable[row],
                        "count": times,
                        "share_of_token": share,
                        "information": float(terms_V[row]),
                    }
                )
        described.append(
            {
                "slot": slot,
                "choices": int(used_N[slot]),
                "share": int(used_N[slot]) / max(found.layers[name].choices, 1),
                "token_entropy": entropy(counts_VN[:, slot]),
                "tokens": rows,
            }
        )
    return described


def _print(
    found: ModelSpecialization,
    listed: Mapping[str, list[dict[str, Any]]],
    inspection: Inspection,
) -> None:
    columns = ["layer", "method", ">slots", ">H(slot)", ">attainable", ">I(token; slot)"]
    columns += [">by chance", ">explained", "most used slot's tokens"]
    rows = []
    for name, summary in found.layers.items():
        most_used = listed[name][0]
        words = " ".join(f"'{token['text']}'" for token in most_used["tokens"][:4])
        rows.append(
            [
                name.split(" ", 1)[1],
                found.methods[name],
                f"{found.counts[name].shape[1]:,}",
                *_figures(summary),
                f"{most_used['slot']}: {words or 'none in particular'}",
            ]
        )
    title = f"{inspection.title} in windows of {found.sequence_length:,}; in nats"
    print_table(title, columns, rows)
    if found.between:
        columns = ["layers", ">H(slot)", ">attainable", ">I(slot; slot)", ">by chance"]
        rows = [
            [f"{a.split(' ', 1)[1]} → {b.split(' ', 1)[1]}", *_figures(summary)]
            for (a, b), summary in found.between.items()
        ]
        print_table(
            "Paths between layers, by the slot that weighs most", [*columns, ">explained"], rows
        )


def _figures(summary: Specialization) -> list[str]:
    nats = (summary.entropy, summary.attainable, summary.information, summary.chance)
    return [*(f"{value:.3f}" for value in nats), explained(summary)]


def explained(summary: Specialization) -> str:
    """Write the share that is explained; a dash where there is nothing to explain."""
    return "–" if summary.explained is None else f"{summary.explained:.1%}"


def _write(
    found: ModelSpecialization,
    listed: Mapping[str, list[dict[str, Any]]],
    readable: list[str],
    inspection: Inspection,
) -> None:
    layers = [
        {
            "layer": name,
            "method": found.methods[name],
            "kind": found.kinds[name],
            "num_slots": found.counts[name].shape[1],
            **asdict(summary),
            "slots": listed[name],
        }
        for name, summary in found.layers.items()
    ]
    told_apart = int((found.token_ids >= 0).sum())
    report = {
        "sequence_length": found.sequence_length,
        "tokens_told_apart": told_apart,
        "layers": layers,
        "between_layers": [
            {"from": a, "to": b, **asdict(summary)} for (a, b), summary in found.between.items()
        ],
        "paths": _ways(found),
    }
    rows = [
        {
            "layer": name,
            "method": found.methods[name],
            **{key: slot[key] for key in ("slot", "choices", "share", "token_entropy")},
            "tokens": " ".join(f"'{token['text']}'" for token in slot["tokens"]),
        }
        for name, slots in listed.items()
        for slot in slots
    ]
    tensors = {f"{name}.counts": counts for name, counts in found.counts.items()}
    tensors |= {f"{a} to {b}.counts": table for (a, b), table in found.paths.tables.items()}
    inspection.write(
        "experts",
        report,
        rows,
        _figures_of(found, readable, inspection.source),
        {"token_ids": found.token_ids, **tensors},
    )


def _ways(found: ModelSpecialization) -> dict[str, Any]:
    """List the commonest ways through all layers."""
    ways = found.paths.ways
    common = [
        {"slots": list(way), "tokens": times, "share": times / found.tokens}
        for way, times in ways.most_common(_MOST_WAYS)
    ]
    return {
        "layers": found.paths.names,
        "different": len(ways),
        "forgotten_tokens": found.paths.forgotten,
        "commonest": common,
    }


def _figures_of(found: ModelSpecialization, readable: list[str], source: str) -> dict[str, Any]:
    headings = {
        name: f"{name}: {found.methods[name]}, {explained(summary)} explained"
        for name, summary in found.layers.items()
    }
    figures = {"experts": draw_tokens(found.counts, readable, headings, f"Tokens: {source}")}
    if found.between:
        titles = {pair: f"{explained(s)} explained" for pair, s in found.between.items()}
        figures["paths"] = draw_paths(found.paths.tables, titles, f"Paths: {source}")
    return figures
