"""Looking at a checkpoint: how many directions its hidden activations and weights use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.curves import draw_spectra
from moezoo.analysis.neurons import Neurons
from moezoo.analysis.spectrum import Covariance, Spectrum, spectrum_of, squared_singular_values
from moezoo.analysis.watching import Context, token_mask, watch
from moezoo.command.tables import print_table
from moezoo.feed_forward import FeedForward
from moezoo_models.inspect.common import (
    Stream,
    blocks_by_name,
    full_name,
    neuron_sets,
    passes,
)
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating

MOST_BYTES = 2**30
"""Room for covariances; where a model's need more, the text passes several times."""

BEFORE, AFTER, OUTPUT = "before activation", "after activation", "output"


@dataclass(frozen=True)
class Spectra:
    """The spectra of one thing, of which each expert may have its own.

    Attributes:
        layer: ``layer 3``, or ``layer 3, shared expert``.
        method: class of the layer.
        what: ``before activation``, ``after activation``, ``output``, or a weight's name.
        tokens: ``(M,)`` int64, number of vectors of each of M covariances; None for weights.
        eigenvalues: ``(M, D)`` fp64, descending.
    """

    layer: str
    method: str
    what: str
    tokens: Tensor | None
    eigenvalues: Tensor

    def summary(self) -> Spectrum:
        """Average the figures of those experts that have any variance."""
        live = self.eigenvalues[self.eigenvalues.sum(dim=-1) > 0]
        if not len(live):
            return spectrum_of(self.eigenvalues[0])
        rows = [asdict(spectrum_of(values)) for values in live]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return Spectrum(**{**mean, "width": self.eigenvalues.shape[1]})

    def shares(self) -> Tensor:
        """Return each direction's share of the variance, averaged likewise: ``(D,)``."""
        total = self.eigenvalues.sum(dim=-1, keepdim=True)
        live = total.squeeze(-1) > 0
        if not live.any():
            return self.eigenvalues[0]
        return (self.eigenvalues / total.clamp(min=1e-300))[live].mean(dim=0)

    def row(self) -> dict[str, Any]:
        """Return one line of a table."""
        summary = asdict(self.summary())
        fewest = None if self.tokens is None else int(self.tokens.min())
        head = {"layer": self.layer, "method": self.method, "what": self.what}
        return {**head, "matrices": len(self.eigenvalues), "fewest_tokens": fewest, **summary}


def inspect_spectrum(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/spectrum",
    **reading: Any,
) -> list[Spectra]:
    """Print and draw how many directions a checkpoint's activations and weights use.

    The text passes the model, and the covariances of what goes into activation functions, of what
    comes out, and of the layers' outputs are added up; an expert's over the tokens that it got.
    Written to the output directory: spectrum.json and spectrum.csv with the figures of the table,
    spectrum.png, and spectrum.safetensors with all eigenvalues.

    Args:
        checkpoint: directory of a checkpoint.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The spectra, layer by layer.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or has
            no feed-forward layer; an option is out of range; the output cannot be written.
    """
    inspection = open_inspection(checkpoint, text, output, neuron_sets, **reading)
    found = measure_spectra(inspection.model, inspection.tokens, **inspection.windows)
    _print(found, inspection.title)
    _write(found, inspection)
    return found


def measure_spectra(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    most_bytes: int = MOST_BYTES,
) -> list[Spectra]:
    """Measure a model in memory on tokens; see :func:`inspect_spectrum`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        sequence_length: as for :func:`inspect_spectrum`.
        batch_size: as there.
        most_bytes: room for covariances, in bytes. One layer's are held in any case.

    Raises:
        InputError: there are no tokens or no feed-forward layers, an option is out of range, or a
            token id is outside the model's vocabulary.
    """
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    sets, layers = neuron_sets(model), blocks_by_name(model)
    found: list[Spectra] = []
    for names in _portions(sets, layers, most_bytes):
        covariances = {name: _Layer(layers[name], sets[name]) for name in names}

        def see(
            name: str,
            layer: FeedForward,
            hidden: Tensor,
            context: Context,
            portion: dict[str, _Layer] = covariances,
        ) -> None:
            portion[name].add(layer, hidden, context)

        with evaluating(model), watch({name: layers[name] for name in names}, see):
            for _ in passes(model, stream):
                pass
        for name, covariance in covariances.items():
            found += covariance.spectra(name, layers[name])
    return found


def _portions(
    sets: dict[str, list[Neurons]], layers: dict[str, FeedForward], most_bytes: int
) -> Iterator[list[str]]:
    """Group layers so that the covariances of a group have room."""
    group: list[str] = []
    held = 0
    for name, parts in sets.items():
        cells = layers[name].d_model ** 2
        cells += sum(
            2 * neurons.number * neurons.width for neurons in parts if _has_hidden(neurons)
        )
        if group and held + 8 * cells > most_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += 8 * cells
    yield group


def _has_hidden(neurons: Neurons) -> bool:
    """Return whether tokens share a hidden layer, and do not each put one together."""
    return neurons.unit not in ("value", "tree") and neurons.width > 1


class _Layer:
    """Covariances of one layer."""

    def __init__(self, layer: FeedForward, parts: list[Neurons]) -> None:
        self.parts = [neurons for neurons in parts if _has_hidden(neurons)]
        self.hidden = [
            {what: _stack(neurons) for what in (BEFORE, AFTER)} for neurons in self.parts
        ]
        self.output = Covariance(layer.d_model)

    def add(self, layer: FeedForward, hidden: Tensor, context: Context) -> None:
        for neurons, by_what in zip(self.parts, self.hidden, strict=True):
            for block in neurons.read(hidden, context):
                assert block.before is not None
                expert = int(block.neurons[0]) // neurons.width
                by_what[BEFORE][expert].add(block.before)
                by_what[AFTER][expert].add(block.activations)
        answer = layer.forward(hidden, **context).hidden
        real = token_mask(hidden, context).to(answer.device)
        self.output.add(answer.reshape(-1, layer.d_model)[real])

    def spectra(self, name: str, layer: FeedForward) -> Iterator[Spectra]:
        method = type(layer).__name__
        for neurons, by_what in zip(self.parts, self.hidden, strict=True):
            for what, stack in by_what.items():
                tokens = torch.tensor([covariance.tokens for covariance in stack])
                values = torch.stack([covariance.eigenvalues() for covariance in stack])
                yield Spectra(full_name(name, neurons), method, what, tokens, values)
        tokens, values = torch.tensor([self.output.tokens]), self.output.eigenvalues()[None]
        yield Spectra(name, method, OUTPUT, tokens, values)
        for weight, parameter in layer.named_parameters():
            if parameter.ndim in (2, 3):
                stacked = parameter if parameter.ndim == 3 else parameter[None]
                values = torch.stack([squared_singular_values(matrix) for matrix in stacked])
                yield Spectra(name, method, weight, None, values)


def _stack(neurons: Neurons) -> list[Covariance]:
    return [Covariance(neurons.width) for _ in range(neurons.number // neurons.width)]


def _print(found: list[Spectra], title: str) -> None:
    columns = ["layer", "method", "of", ">matrices", ">tokens", ">width", ">hard rank"]
    columns += [">soft rank", ">concentration", ">utilization"]
    rows = []
    for one in found:
        row = one.row()
        fewest = "" if row["fewest_tokens"] is None else f"{row['fewest_tokens']:,}"
        rows.append(
            [
                one.layer.removeprefix("layer "),
                one.method,
                one.what,
                f"{row['matrices']:,}",
                fewest,
                f"{row['width']:,}",
                f"{row['hard_rank']:.1f}",
                f"{row['soft_rank']:.1f}",
                f"{row['concentration']:.3f}",
                f"{row['utilization']:.2%}",
            ]
        )
    print_table(f"{title}; of several experts the mean ranks and the fewest tokens", columns, rows)
    short = [one for one in found if one.tokens is not None and _is_short(one)]
    if short:
        print(
            f"{len(short)} covariances have fewer than 10 tokens per direction, so that their "
            "ranks come out too low; give a longer text\n"
        )


def _is_short(one: Spectra) -> bool:
    assert one.tokens is not None
    return int(one.tokens.min()) < 10 * one.eigenvalues.shape[1]


def _write(found: list[Spectra], inspection: Inspection) -> None:
    rows = [one.row() for one in found]
    tensors = {f"{one.layer}.{one.what}": one.eigenvalues for one in found}
    drawn = {one.layer: one for one in found if one.what == AFTER}
    drawn |= {one.layer: one for one in found if one.what == OUTPUT and one.layer not in drawn}
    order = list(dict.fromkeys(one.layer for one in found))
    names = [name for name in order if name in drawn]
    figure = draw_spectra(
        {name: (drawn[name].summary(), drawn[name].shares()) for name in names},
        {name: f"{name}: {drawn[name].method}, {drawn[name].what}" for name in names},
        f"Spectra: {inspection.source}",
    )
    inspection.write("spectrum", {"spectra": rows}, rows, {"spectrum": figure}, tensors)
