"""Looking at a checkpoint: what attention and feed-forward blocks do to the residual stream.

The two analyses of Sonkar and Baraniuk 2023 (arXiv:2305.13297), by which they explain why both may
run beside each other: feed-forward blocks keep hidden states from pointing the same way, and what
attention adds is small beside what it is added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.analysis.curves import draw_blocks
from moezoo.analysis.isotropy import MeanCosine
from moezoo.command.tables import print_table
from moezoo.errors import InputError
from moezoo_models.inspect.common import Stream, passes
from moezoo_models.inspect.inspection import Inspection, open_inspection
from moezoo_models.mode import evaluating
from moezoo_models.model.block import DecoderLayer
from moezoo_models.model.causal_lm import MoezooForCausalLM


@dataclass(frozen=True)
class BlockFigures:
    """What one block does to the residual stream, over the tokens of a text.

    With h what enters the block, a what attention adds to it and f what the feed-forward block
    adds:

    Attributes:
        layer: ``layer 3``.
        method: class of the feed-forward block.
        cosine_before: mean cosine of all pairs of tokens' h.
        cosine_attended: the same of ``h + a``.
        cosine_after: the same of ``h + a + f``.
        attention: ``‖a‖ / ‖h‖``, mean over tokens.
        feed_forward: ``‖f‖ / ‖h‖``, likewise.
    """

    layer: str
    method: str
    cosine_before: float
    cosine_attended: float
    cosine_after: float
    attention: float
    feed_forward: float


@dataclass(frozen=True)
class ModelBlocks:
    """The figures of a model's blocks.

    Attributes:
        tokens: number of tokens, each of which passed every block once.
        sequence_length: tokens that the model saw at once.
        parallel: how its blocks stand to attention, as in its configuration.
        blocks: from the first.
    """

    tokens: int
    sequence_length: int
    parallel: str
    blocks: tuple[BlockFigures, ...]


def inspect_blocks(
    checkpoint: str | Path,
    text: str | Path,
    output: str | Path = "runs/blocks",
    **reading: Any,
) -> ModelBlocks:
    """Print and draw how alike hidden states are around each block, and how much each part adds.

    Every token of the text passes the model once. Written to the output directory: blocks.json and
    blocks.csv with the figures of the table, blocks.png, and blocks.safetensors with them in fp64.

    Args:
        checkpoint: directory of a checkpoint of ours, or of a dense model.
        text: path of a text file in UTF-8.
        output: directory that the files are written to.
        reading: other options of
            :func:`~moezoo_models.inspect.inspection.open_inspection`, by name.

    Returns:
        The figures, as they are written.

    Raises:
        InputError: the file is missing, empty or binary; the checkpoint cannot be loaded, or is a
            mixture of transformers; an option is out of range; the output cannot be written.
    """
    inspection = open_inspection(checkpoint, text, output, _decoder_of, **reading)
    found = measure_blocks(inspection.model, inspection.tokens, **inspection.windows)
    _print(found, inspection)
    _write(found, inspection)
    return found


def measure_blocks(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
) -> ModelBlocks:
    """Measure a model in memory on tokens; see :func:`inspect_blocks`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        sequence_length: as for :func:`inspect_blocks`.
        batch_size: as there.

    Raises:
        InputError: there are no tokens, an option is out of range, or a token id is outside the
            model's vocabulary; or the model is one of transformers.
    """
    decoder = _decoder_of(model)
    stream = Stream.of(model, tokens, sequence_length, batch_size)
    watched = [_Watched(number, block) for number, block in enumerate(decoder.model.blocks())]
    with evaluating(model), _watching(watched):
        for _ in passes(model, stream):
            pass
    return ModelBlocks(
        tokens=len(stream.tokens),
        sequence_length=stream.sequence_length,
        parallel=decoder.config.parallel,
        blocks=tuple(block.figures() for block in watched),
    )


def _decoder_of(model: PreTrainedModel) -> MoezooForCausalLM:
    """Return the model if it is ours.

    Raises:
        InputError: it is not, or has memories.
    """
    if isinstance(model, MoezooForCausalLM):
        if model.config.memory:
            raise InputError(
                "checkpoint: it has memories beside its blocks, whose part these figures do not "
                "tell apart; give a model without"
            )
        return model
    raise InputError(
        f"checkpoint: it is a {type(model).__name__} of transformers, whose blocks nothing here "
        "reads; give a model of ours, or a dense one"
    )


class _Watched:
    """One block, and sums over the tokens that it has seen."""

    def __init__(self, number: int, block: DecoderLayer) -> None:
        self.block, self._number = block, number
        width = block.mlp.d_model
        self._cosines = [MeanCosine(width) for _ in range(3)]
        self._ratios = torch.zeros(2, dtype=torch.float64)
        self._attended: Tensor | None = None

    def see_attended(self, _: Any, __: Any, output: tuple[Any, ...]) -> None:
        """Keep what attention has put out."""
        self._attended = output[0]

    def see(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add the tokens of a pass."""
        entering, after = args[0], output[0]
        attended = self.block.with_attended(entering, cast(Tensor, self._attended))
        mask = kwargs["tokens"].mask
        h, h_attended, h_after = (
            part.flatten(0, 1) if mask is None else part[mask[:, -part.shape[1] :]]
            for part in (entering.double(), attended.double(), after.double())
        )
        for cosine, states in zip(self._cosines, (h, h_attended, h_after), strict=True):
            cosine.add(states)
        length = h.norm(dim=-1).clamp(min=1e-300)
        for place, part in enumerate((h_attended - h, h_after - h_attended)):
            self._ratios[place] += (part.norm(dim=-1) / length).sum().cpu()

    def figures(self) -> BlockFigures:
        """Return the means."""
        before, attended, after = (cosine.value() for cosine in self._cosines)
        of_attention, of_feed_forward = (self._ratios / self._cosines[0].vectors).tolist()
        return BlockFigures(
            layer=f"layer {self._number}",
            method=type(self.block.mlp).__name__,
            cosine_before=before,
            cosine_attended=attended,
            cosine_after=after,
            attention=of_attention,
            feed_forward=of_feed_forward,
        )


@contextmanager
def _watching(watched: Sequence[_Watched]) -> Iterator[None]:
    hooks = [each.block.self_attn.register_forward_hook(each.see_attended) for each in watched]
    hooks += [each.block.register_forward_hook(each.see, with_kwargs=True) for each in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _print(found: ModelBlocks, inspection: Inspection) -> None:
    columns = ["layer", "method", ">cosine before", ">after attention", ">after block"]
    columns += [">attention / stream", ">feed-forward / stream"]
    rows = [
        [
            one.layer.removeprefix("layer "),
            one.method,
            f"{one.cosine_before:.3f}",
            f"{one.cosine_attended:.3f}",
            f"{one.cosine_after:.3f}",
            f"{one.attention:.1%}",
            f"{one.feed_forward:.1%}",
        ]
        for one in found.blocks
    ]
    windows = f"{inspection.title} in windows of {found.sequence_length:,}"
    print_table(f"{windows}; parallel: {found.parallel}", columns, rows)


def _write(found: ModelBlocks, inspection: Inspection) -> None:
    rows = [asdict(one) for one in found.blocks]
    numbers = [key for key in rows[0] if isinstance(rows[0][key], float)]
    report = {
        "sequence_length": found.sequence_length,
        "parallel": found.parallel,
        "layers": rows,
    }
    tensors = {
        key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in numbers
    }
    title = f"Blocks (parallel: {found.parallel}): {inspection.source}"
    figure = draw_blocks({key: tensor.tolist() for key, tensor in tensors.items()}, title)
    inspection.write("blocks", report, rows, {"blocks": figure}, tensors)
