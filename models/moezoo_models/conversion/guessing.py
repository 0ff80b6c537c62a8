"""Finding what methods that guess need for a checkpoint: predictors, and R-Sparse's factors.

Shapes: T tokens, D d_model, F neurons, R rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moezoo.convert import Block
from moezoo.convert.select.guess import (
    GuessMethod,
    GuessOptions,
    LayerGuess,
    LayerRemainder,
    guess,
    neurons_for,
    overhead,
    remainder_rank,
)
from moezoo.convert.select.predictors import LowRankScores
from moezoo.selection import Shares
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.conversion.selecting import first_of_windows
from moezoo_models.conversion.stage import Answer

_LIMITS = ("input", "up_input", "hidden", "gate")


@dataclass(frozen=True, eq=False)
class Guessing:
    """A method that guesses, at one share of the work, as a variant of the dense model.

    Attributes:
        method: the method.
        work: share of each block's work, the guess included; polar has its recall instead.
        options: the others.
        length: tokens L of a window.
        d_model: D.
        width: F.
        dtype: in which the model is written.
        seed: of what is drawn.
        directory: where what is found is kept; None keeps nothing.

    Raises:
        InputError: an option is out of range, or the guess alone is more than the work.
    """

    method: GuessMethod
    work: float
    options: GuessOptions
    length: int
    d_model: int
    width: int
    dtype: torch.dtype
    seed: int = 0
    directory: Path | None = None

    def __post_init__(self) -> None:
        self.options.check()
        if self.method == "r_sparse":
            remainder_rank(self.work, self.options, self.d_model, self.width)
        else:
            neurons_for(self.work, self.options, self.d_model, self.width)

    def inside(self, directory: Path) -> Guessing:
        """Return the same that keeps what it finds in a directory."""
        return replace(self, directory=directory)

    def __call__(self, layer: int, x_TD: Tensor, block: Block) -> Answer:
        """Find what a layer needs, or read what an earlier run found; return its block."""
        first = first_of_windows(len(x_TD), self.length).to(x_TD.device)
        file = None if self.directory is None else self._file(layer)
        if file is None or not file.is_file():
            seed = self.seed * 1_000_003 + layer
            found = guess(self.method, block, x_TD[~first], self.work, self.options, seed)
            if file is None:
                return partial(self._run, found, block)
            _save(file, self._rounded(found.tensors()), _figures(found))
        return partial(self._run, self._read(layer, block), block)

    def _run(self, found: LayerGuess | LayerRemainder, block: Block, x_TD: Tensor) -> Tensor:
        return found.run(block, x_TD, first_of_windows(len(x_TD), self.length).to(x_TD.device))

    def _rounded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring all but thresholds to the dtype of the checkpoint."""
        return {
            name: tensor.float() if name in _LIMITS else tensor.to(self.dtype)
            for name, tensor in tensors.items()
        }

    def _read(self, layer: int, block: Block) -> LayerGuess | LayerRemainder:
        with safe_open(self._file(layer), framework="pt") as file:
            device = block.up.device
            tensors = {name: file.get_tensor(name).float().to(device) for name in file.keys()}  # noqa: SIM118
        figures = self.figures(layer)
        if self.method == "r_sparse":
            factors = {
                name: (tensors[f"factors.{name}.left"], tensors[f"factors.{name}.right"])
                for name in ("gate", "up", "down")
                if f"factors.{name}.left" in tensors
            }
            limits = {name: tensors[name] for name in _LIMITS[:3]}
            return LayerRemainder(limits, factors, Shares(*figures["shares"]))
        return _guess_of(tensors, figures, self.method, block)

    def _file(self, layer: int) -> Path:
        assert self.directory is not None
        return self.directory / f"guess-{layer:05d}.safetensors"

    def figures(self, layer: int) -> dict[str, Any]:
        """Return what was found beside tensors: the shares, and of a guess k, recall, energy."""
        with safe_open(self._file(layer), framework="pt") as file:
            return json.loads(file.metadata()["figures"])

    def tensor(self, layer: int, name: str) -> Tensor:
        """Return a tensor of a layer's selector, as the checkpoint holds it."""
        if name == "shares":
            return torch.tensor(self.figures(layer)["shares"], dtype=torch.float32)
        with safe_open(self._file(layer), framework="pt") as file:
            return file.get_tensor(name)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each of a selector's tensors."""
        if self.method != "r_sparse":
            rank, d_model, width = self.options.rank, self.d_model, self.width
            shapes = {"reduce": (rank, d_model), "expand": (width, rank), "bias": (width,)}
            if self.method == "low_rank_gate":
                shapes["length"] = (width,)
            return {name: (shape, self.dtype) for name, shape in shapes.items()}
        sizes = {"input": self.d_model, "gate": self.width, "up_input": self.d_model}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((size,), torch.float32)
            for name, size in {**sizes, "hidden": self.width, "shares": len(Shares._fields)}.items()
        }
        for matrix in ("gate", "up", "down") if (rank := self._remainder()) else ():
            ins, outs = (
                (self.width, self.d_model) if matrix == "down" else (self.d_model, self.width)
            )
            found[f"factors.{matrix}.left"] = ((outs, rank), self.dtype)
            found[f"factors.{matrix}.right"] = ((rank, ins), self.dtype)
        return found

    def selection(self, layer: int) -> dict[str, Any]:
        """Return the options of a layer's rule."""
        if self.method == "r_sparse":
            return {"kind": "threshold", "remainder": self._remainder()}
        return {
            "kind": "predictor",
            "top_k": self.figures(layer)["count"],
            "rank": self.options.rank,
            "score": "gate" if self.method == "low_rank_gate" else "logit",
            "norm": self.method == "polar",
        }

    def _remainder(self) -> int:
        return remainder_rank(self.work, self.options, self.d_model, self.width)

    @property
    def overhead(self) -> float:
        """Return what the guess, or the factors, add to the share of a block's work."""
        per_rank = self.d_model + self.width
        rank = 3 * self._remainder() if self.method == "r_sparse" else self.options.rank
        return overhead(rank * per_rank, self.d_model, self.width)


def _figures(found: LayerGuess | LayerRemainder) -> dict[str, Any]:
    figures: dict[str, Any] = {"shares": list(found.shares)}
    if isinstance(found, LayerGuess):
        figures |= {"count": found.count, "recall": found.recall, "energy": found.energy}
    return figures


def _guess_of(
    tensors: dict[str, Tensor], figures: dict[str, Any], method: str, block: Block
) -> LayerGuess:
    scores = LowRankScores(
        tensors["reduce"],
        tensors["expand"],
        tensors["bias"],
        norm=method == "polar",
        act=block.act if method == "low_rank_gate" else None,
        length=tensors.get("length"),
    )
    return LayerGuess(scores, figures["count"], figures["recall"], figures["energy"])


def _save(file: Path, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as handle:
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        handle.write(save(plain, {"figures": json.dumps(figures)}))
