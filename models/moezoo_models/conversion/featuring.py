"""Fitting random features to a checkpoint's blocks, and keeping what was found.

Shapes: T tokens, D d_model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moezoo.convert import Block
from moezoo.convert.features import fit_features
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.conversion.carving import read_block, save_block
from moezoo_models.conversion.selecting import first_of_windows
from moezoo_models.conversion.stage import Answer


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer's output over the output, on tokens that nothing was fitted to.

    Attributes:
        fitted: of features that are fitted, by their number.
        universal: of as many features that estimate the block without bias; None where they are
            beyond what fp64 holds.
        linear: of a linear map that is fitted.
        exact: whether the first token of a text is kept as it was.
    """

    fitted: dict[str, float]
    universal: dict[str, float | None]
    linear: float
    exact: bool


@dataclass(frozen=True)
class Featuring:
    """Random features as a variant of the dense model.

    Attributes:
        features: r.
        length: tokens L of a window.
        dtype: in which the model is written.
        seed: of the features; every layer has draws of its own.
    """

    features: int
    length: int
    dtype: torch.dtype
    seed: int

    def convert(self, directory: Path, layer: int, x_TD: Tensor, block: Block) -> Answer:
        """Fit a layer's features, or read what an earlier run found; return its new block.

        Args:
            directory: where what is found is kept.
            layer: its number.
            x_TD: ``(T, D)``, its inputs.
            block: its dense block.
        """
        file = _file(directory, layer)
        if not file.is_file():
            first = first_of_windows(len(x_TD), self.length).to(x_TD.device)
            seed = self.seed * 1_000_003 + layer
            found = fit_features(block, x_TD, self.features, first, seed, self.dtype)
            save_block(directory, layer, found.block)
            errors = LayerErrors(
                {str(count): error for count, error in found.errors.items()},
                {
                    str(count): error if math.isfinite(error) else None
                    for count, error in found.universal.items()
                },
                found.linear,
                found.exact,
            )
            with atomic_write(file, "w") as handle:
                json.dump(asdict(errors), handle)
        weights = read_block(directory, layer)
        dense = {name: t.to(self.dtype).float().to(x_TD.device) for name, t in weights.items()}
        return Block(None, act=torch.relu, **dense).run

    def errors(self, directory: Path, layer: int) -> LayerErrors:
        """Return what a layer's features err by."""
        return LayerErrors(**json.loads(_file(directory, layer).read_text()))


def _file(directory: Path, layer: int) -> Path:
    return directory / f"errors-{layer:05d}.json"
