"""Variants of a dense model, computed beside each other, one layer at a time.

Every variant has in each layer a feed-forward block of its own, found on what its own earlier
layers put out. Hidden states between two layers are in a memory-mapped file; it appears when a
layer is complete, and a run that was killed goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Answer, Head, Stage, embed
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import write_safetensors

States = dict[str, Tensor]
"""``variant.fitted`` and ``variant.held_out``: ``(windows, length, D)`` fp32."""


@dataclass(frozen=True)
class Variant:
    """A way to change the dense model.

    Attributes:
        name: its name.
        convert: given a layer's number, its inputs ``(T, D)`` on the calibration tokens and its
            dense block, gives the block to use; None for the dense model itself.
        follows: name of the variant without changes; ``convert`` is then also given the outputs
            ``(T, D)`` with which the layer would put out what it puts out there: what earlier
            layers are off by is made up for.
    """

    name: str
    convert: Callable[..., Answer] | None
    follows: str | None = None


@dataclass(frozen=True)
class Propagation:
    """Variants of one model on one text.

    Attributes:
        source: the dense model.
        calibration: the text.
        variants: what is computed beside each other.
        layers: those that variants convert; others stay dense.
        directory: for hidden states; those of an earlier run are used.
        device: where to compute.
    """

    source: Source
    calibration: Calibration
    variants: Sequence[Variant]
    layers: tuple[int, ...]
    directory: Path
    device: torch.device

    @property
    def bytes(self) -> int:
        """Room for hidden states: those that come into a layer and those that come out."""
        windows = 2 * sum(len(tokens) for _, tokens in self._parts())
        # Between attention and the block to be found, and what is to be followed.
        windows += (1 + bool(self._followed)) * len(self.calibration.fitted)
        length, width = self.calibration.fitted.shape[1], self.source.config.hidden_size
        return windows * length * width * torch.float32.itemsize

    def run(self, progress: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Pass all variants through all layers.

        Args:
            progress: called after each layer, also those that an earlier run computed.

        Returns:
            Each variant's cross-entropy, ``(windows, length - 1)`` fp32 in nats, on the held-out
            tokens.
        """
        done = self._done()
        for layer in range(self.source.num_layers):
            if layer >= done:
                self._advance(layer)
            progress()
        head = Head(self.source, self.device)
        tokens, skipped = self.calibration.held_out, self.calibration.skipped
        with self._states(self.source.num_layers) as states:
            return {
                variant.name: head.nats(states[f"{variant.name}.held_out"], tokens, skipped)
                for variant in self.variants
            }

    @property
    def _followed(self) -> set[str]:
        return {variant.follows for variant in self.variants if variant.follows is not None}

    def _parts(self, layer: int = 0) -> Iterator[tuple[str, Tensor]]:
        """List the names of hidden states, a variant's fitted ones first, and their tokens.

        Args:
            layer: into which they come; nothing is fitted to what comes out of the last one.
        """
        for variant in self.variants:
            needed = variant.convert is not None or variant.name in self._followed
            if needed and layer < self.source.num_layers:
                yield f"{variant.name}.fitted", self.calibration.fitted
            yield f"{variant.name}.held_out", self.calibration.held_out

    def _advance(self, layer: int) -> None:
        stage = Stage(self.source, layer, self.device)
        self.directory.mkdir(parents=True, exist_ok=True)
        attended = _Kept(self.directory / ".attended")
        followed = _Kept(self.directory / ".followed")
        by_name = {variant.name: variant for variant in self.variants}
        with self._states(layer) as states:

            @lru_cache(maxsize=1)
            def follow(name: str) -> _Kept:
                followed.fill(stage.outputs(states[f"{name}.fitted"], stage.block.run))
                return followed

            def wanted(variant: Variant) -> tuple[Tensor, ...]:
                if variant.follows is None:
                    return ()
                pairs = zip(follow(variant.follows).read(), attended.read(), strict=True)
                return (torch.cat([(out - seen).flatten(0, 1) for out, seen in pairs]),)

            @lru_cache(maxsize=1)
            def answer(variant: Variant) -> Answer:
                if variant.convert is None or layer not in self.layers:
                    return stage.block.run
                attended.fill(stage.attended(states[f"{variant.name}.fitted"]))
                inputs = torch.cat([stage.inputs(each) for each in attended.read()])
                return variant.convert(layer, inputs, stage.block, *wanted(variant))

            def pieces(variant: Variant, part: str) -> Iterator[Tensor]:
                if variant.name in self._followed and "fitted" in part:
                    return follow(variant.name).read()
                block = answer(variant)
                if variant.convert is None or layer not in self.layers or "fitted" not in part:
                    return stage.outputs(states[part], block)
                return (stage.answered(each, block) for each in attended.read())

            outputs = [
                Output(
                    part,
                    (*tokens.shape, self.source.config.hidden_size),
                    torch.float32,
                    partial(pieces, by_name[part.rpartition(".")[0]], part),
                )
                for part, tokens in self._parts(layer + 1)
            ]
            temporary = self.directory / ".states.new"
            write_safetensors(temporary, outputs)
            temporary.rename(self._file(layer + 1))
        self._file(layer).unlink(missing_ok=True)
        for kept in (attended, followed):
            kept.file.unlink(missing_ok=True)

    @contextmanager
    def _states(self, layer: int) -> Iterator[States]:
        """Map the hidden states that come into a layer; those of the first are looked up."""
        if layer == 0:
            texts = (self.calibration.fitted, self.calibration.held_out)
            known = {id(tokens): embed(self.source, tokens) for tokens in texts}
            yield {part: known[id(tokens)] for part, tokens in self._parts()}
            return
        with safe_open(self._file(layer), framework="pt") as file:
            yield {part: file.get_tensor(part) for part, _ in self._parts(layer)}

    def _file(self, layer: int) -> Path:
        return self.directory / f"states-{layer:05d}.safetensors"

    def _done(self) -> int:
        """Count the layers that an earlier run completed."""
        return max(
            (n for n in range(self.source.num_layers + 1) if self._file(n).is_file()), default=0
        )


class _Kept:
    """Hidden states of one variant within a layer, in a file.

    Those between attention and a block would else be computed twice: for the inputs on which the
    block is found, and for its outputs. In memory they would be needed beside the activations that
    it is found on.

    Args:
        file: where; what is there is replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._shapes: list[torch.Size] = []

    def fill(self, states: Iterable[Tensor]) -> None:
        """Keep states, ``(w, L, D)`` each, on the CPU."""
        self._shapes = []
        with self.file.open("wb") as file:
            for each in states:
                file.write(each.contiguous().numpy().data)
                self._shapes.append(each.shape)

    def read(self) -> Iterator[Tensor]:
        """Yield the states as they were computed."""
        with self.file.open("rb") as file:
            for shape in self._shapes:
                content = bytearray(file.read(shape.numel() * torch.float32.itemsize))
                yield torch.frombuffer(content, dtype=torch.float32).view(shape)
