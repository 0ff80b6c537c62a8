"""Parts of `moezoo inspect` commands: a text passed through a model, and names of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.neurons import Neurons, neurons_of
from moezoo.analysis.usage import routed_layers
from moezoo.errors import InputError, check_int
from moezoo.feed_forward import FeedForward
from moezoo_models.adopt import adopted_layers
from moezoo_models.evaluation.scoring import window_length
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.inputs import check_token_ids
from moezoo_models.progress import progress_bar


@dataclass(frozen=True)
class Stream:
    """A text as the model is given it.

    Attributes:
        tokens: ``(T,)`` int64, on the CPU.
        sequence_length: tokens that the model sees at once.
        batch_size: windows computed at once.
    """

    tokens: Tensor
    sequence_length: int
    batch_size: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokens: Sequence[int] | Tensor,
        sequence_length: int | None,
        batch_size: int,
    ) -> Stream:
        """Check tokens and options.

        Raises:
            InputError: there are no tokens, an option is out of range, or a token id is outside
                the model's vocabulary.
        """
        stream = torch.as_tensor(tokens).long().cpu()
        if not len(stream):
            raise InputError("text: it has no tokens; give a text that is not empty")
        check_token_ids(stream, model.config.vocab_size)
        length = min(window_length(model, sequence_length), len(stream))
        return cls(stream, length, check_int("batch_size", batch_size))


@dataclass(frozen=True)
class Findings:
    """Findings about every layer of a model while a text passed through it.

    Attributes:
        tokens: number of tokens, each of which passed every layer once.
        sequence_length: tokens that the model saw at once.
        methods: class of each layer, by its name: ``layer 3``.
    """

    tokens: int
    sequence_length: int
    methods: dict[str, str]


def blocks_by_name(model: PreTrainedModel) -> dict[str, FeedForward]:
    """Name the feed-forward layers ``layer 3``; blocks of attention alone have none.

    Raises:
        InputError: the model is one of transformers, whose neurons nothing here reads.
    """
    if not isinstance(model, MoezooForCausalLM):
        raise InputError(
            f"checkpoint: it is a {type(model).__name__} of transformers, of which the use of "
            "experts can be inspected (inspect usage, inspect experts), and not its neurons"
        )
    return {
        f"layer {number}": block.mlp
        for number, block in enumerate(model.model.blocks())
        if block.mlp.kind == "feed_forward"
    }


def routed_by_name(model: PreTrainedModel) -> dict[str, FeedForward]:
    """Name the layers that route tokens ``layer 3``, in a model that was adopted as well."""
    if not isinstance(model, MoezooForCausalLM):
        return {
            f"layer {re.findall('[0-9]+', name)[0]}": layer
            for name, layer in adopted_layers(model).items()
        }
    return {_name_of(name): layer for name, layer in routed_layers(model.model.layers).items()}


def _name_of(path: str) -> str:
    """Name a layer by its path among the blocks: ``layer 3``, or ``layer 3, memory 0``."""
    number, kind, *rest = path.split(".")
    return f"layer {number}, memory {rest[0]}" if kind == "memories" else f"layer {number}"


@torch.no_grad()
def passes(model: PreTrainedModel, stream: Stream) -> Iterator[tuple[int, Tensor]]:
    """Pass the text through the decoder, showing how far it is.

    Yields:
        After each pass, the place of its first token in the text, and its tokens ``(T,)``: those
        of all its windows, one after the other. Layers may see more, by padding.
    """
    with progress_bar() as bar:
        task = bar.add_task("reading", total=len(stream.tokens))
        start = 0
        for batch in _batches(model, stream):
            _run(model, batch, stream.sequence_length)
            yield start, batch
            start += len(batch)
            bar.update(task, completed=start)


def _batches(model: PreTrainedModel, stream: Stream) -> Iterator[Tensor]:
    """Cut a text into batches; a shorter window at its end goes alone where padding would count."""
    for batch in stream.tokens.split(stream.sequence_length * stream.batch_size):
        whole = len(batch) // stream.sequence_length * stream.sequence_length
        if isinstance(model, MoezooForCausalLM) or not whole:
            yield batch
        else:
            yield from (part for part in (batch[:whole], batch[whole:]) if len(part))


def _run(model: PreTrainedModel, tokens: Tensor, length: int) -> None:
    """Pass windows of one length through the decoder; the last is filled up with padding."""
    if not isinstance(model, MoezooForCausalLM):
        windows = tokens.reshape(-1, min(length, len(tokens)))
        model.base_model(input_ids=windows.to(model.device), use_cache=False)
        return
    missing = -len(tokens) % length
    windows = torch.nn.functional.pad(tokens, (0, missing)).reshape(-1, length)
    mask = None
    if missing:
        mask = torch.arange(windows.numel()).reshape(windows.shape) < len(tokens)
        mask = mask.to(model.device)
    # Padding comes last and the model is causal: attention needs no mask to leave it out.
    model.model(input_ids=windows.to(model.device), token_mask=mask, use_cache=False)


def check_routed(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Refuse a model in which nothing is chosen.

    Raises:
        InputError: names the layers that it has.
    """
    if isinstance(model, MoezooForCausalLM) and not routed_layers(model):
        kinds = sorted({type(block.mlp).__name__ for block in model.model.blocks()})
        raise InputError(
            f"checkpoint: {checkpoint} has no layer that routes tokens, only "
            f"{', '.join(kinds)}; give a model with e.g. SparseMoE or PEER"
        )


def neuron_sets(model: PreTrainedModel) -> dict[str, list[Neurons]]:
    """List the sets of neurons of each feed-forward layer, by the layer's name.

    Raises:
        InputError: the model has no feed-forward layers.
    """
    sets = {name: neurons_of(layer) for name, layer in blocks_by_name(model).items()}
    if not sets:
        raise InputError(
            "checkpoint: it has no feed-forward layers, only attention; give another model"
        )
    return sets


def full_name(layer: str, neurons: Neurons) -> str:
    """Name a set of neurons: ``layer 3``, or ``layer 3, shared expert``."""
    return f"{layer}, {neurons.name}" if neurons.name else layer


def show(text: str, width: int = 24) -> str:
    """Make a token or a context readable in one line: blanks and controls as in Python strings."""
    readable = repr(text)[1:-1] if text else "(nothing)"
    return readable if len(readable) <= width else "…" + readable[1 - width :]
