"""A dense block of which a guess chooses the neurons, or whose weak inputs pass at low rank.

Shapes: T tokens, D d_model, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.select.labels import (
    contributions,
    energy_at,
    label,
    recall_at,
    smallest_count,
)
from moezoo.convert.select.predictors import (
    LowRankScores,
    Training,
    train_predictor,
    whitened_scores,
)
from moezoo.convert.select.r_sparse import channel_thresholds, low_rank, split_budget
from moezoo.errors import InputError, check_choice, check_number
from moezoo.selection import Shares, kept, passes
from moezoo.selection.selector import dropped
from moezoo_kernels.linear import linear

GuessMethod = Literal["predictor", "polar", "low_rank_gate", "r_sparse"]
GUESSES: tuple[str, ...] = get_args(GuessMethod)
_CHUNK = 2048
_MULTIPLE = 128  # what Polar Sparsity rounds its k up to


@dataclass(frozen=True)
class GuessOptions:
    """Options of methods that guess.

    Attributes:
        rank: of the guess; of r_sparse, that of the factors follows from ``inputs``.
        labels: of predictor and polar: the ``strongest`` neurons by their part of the output, or
            the ``positive`` ones that ReLU leaves.
        recall: of polar: each layer has the fewest neurons that reach it on held-out tokens.
        epochs: of predictor and polar, at most.
        inputs: of r_sparse, how much of its budget passes the matrices themselves; the rest is
            that of the factors.
    """

    rank: int = 128
    labels: Literal["strongest", "positive"] = "strongest"
    recall: float = 0.99
    epochs: int = 8
    inputs: float = 0.9

    def check(self) -> None:
        """Raise :class:`~moezoo.InputError` if a number is out of range."""
        Training(rank=self.rank, epochs=self.epochs).check()
        check_choice("guess.labels", self.labels, ("strongest", "positive"))
        if not check_number("guess.recall", self.recall, maximum=1.0):
            raise InputError("guess.recall: 0 needs no neuron; give more")
        check_number("guess.inputs", self.inputs, maximum=1.0)


@dataclass(frozen=True)
class LayerGuess:
    """What a guess found for one block.

    Attributes:
        scores: of the neurons.
        count: neurons per token k.
        recall: on tokens that neither its training nor its choice has seen: the share of those that
            count most that are among the k.
        energy: there, the share of all neurons' squared parts of the output that the k have.
    """

    scores: LowRankScores
    count: int
    recall: float = 0.0
    energy: float = 0.0

    @property
    def shares(self) -> Shares:
        """Return what tokens keep; the guess itself is apart."""
        share = self.count / len(self.scores.expand)
        return Shares(input=share, gate=share, hidden=share)

    def run(self, block: Block, x_TD: Tensor, dense_T: Tensor) -> Tensor:
        """Compute the block with the neurons that are chosen; all for tokens marked dense."""
        parts = []
        for x, dense in zip(x_TD.split(_CHUNK), dense_T.split(_CHUNK), strict=True):
            hidden_TF = block.hidden(x)
            best_TK = self.scores(x).topk(self.count, dim=-1).indices
            mask_TF = torch.zeros_like(hidden_TF, dtype=torch.bool).scatter(-1, best_TK, True)
            chosen_TF = kept(hidden_TF, mask_TF | dense.unsqueeze(-1))
            parts.append(linear(chosen_TF, block.down, block.bias_out))
        return torch.cat(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the selector's tensors by name."""
        bias = self.scores.bias
        found = {
            "reduce": self.scores.reduce,
            "expand": self.scores.expand,
            "bias": self.scores.expand.new_zeros(len(self.scores.expand)) if bias is None else bias,
        }
        return found if self.scores.length is None else {**found, "length": self.scores.length}


@dataclass(frozen=True)
class LayerRemainder:
    """What R-Sparse found for one gated block: thresholds on inputs, and each matrix at low rank.

    Attributes:
        limits: of ``input``, ``up_input`` and ``hidden``, fp32.
        factors: of ``gate``, ``up`` and ``down``: U ``(O, R)`` and V ``(R, I)``; empty for none.
        shares: what calibration tokens kept.
    """

    limits: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    shares: Shares

    def run(self, block: Block, x_TD: Tensor, dense_T: Tensor) -> Tensor:
        """Compute the block as R-Sparse does; whole for tokens marked dense."""
        assert block.gate is not None
        parts = []
        for x, dense in zip(x_TD.split(_CHUNK), dense_T.split(_CHUNK), strict=True):
            gate_TF = self._product("gate", "input", block.gate, x, dense)
            up_TF = self._product("up", "up_input", block.up, x, dense)
            hidden_TF = block.act(gate_TF) * up_TF
            output_TD = self._product("down", "hidden", block.down, hidden_TF, dense)
            parts.append(output_TD if block.bias_out is None else output_TD + block.bias_out)
        return torch.cat(parts)

    def _product(
        self, matrix: str, limit: str, weight: Tensor, x: Tensor, dense_T: Tensor
    ) -> Tensor:
        mask = passes(x, self.limits[limit]) | dense_T.unsqueeze(-1)
        product = linear(kept(x, mask), weight)
        if matrix not in self.factors:
            return product
        left, right = self.factors[matrix]
        others = dropped(x, mask)
        assert others is not None
        return product + linear(linear(others, right), left)

    def tensors(self) -> dict[str, Tensor]:
        """Return the selector's tensors by name; nothing stops a gate."""
        found = {**self.limits, "gate": torch.zeros_like(self.limits["hidden"])}
        for matrix, (left, right) in self.factors.items():
            found |= {f"factors.{matrix}.left": left, f"factors.{matrix}.right": right}
        return found


def overhead(numbers: int, d_model: int, width: int) -> float:
    """Return what numbers that a token multiplies with beside its block add to the block's work."""
    return numbers / (3 * d_model * width)


def neurons_for(work: float, options: GuessOptions, d_model: int, width: int) -> int:
    """Return how many neurons a share of a block's work pays for, the guess of them included.

    Raises:
        InputError: the guess alone takes more.
    """
    own = overhead(options.rank * (d_model + width), d_model, width)
    count = int((work - own) * width)
    if count < 1:
        raise InputError(
            f"work: a guess of rank {options.rank} alone is {own:.3f} of the block's work, and "
            f"{work:g} leaves nothing for neurons; give more work, or lower guess.rank"
        )
    return min(count, width)


def remainder_rank(work: float, options: GuessOptions, d_model: int, width: int) -> int:
    """Return the rank of R-Sparse's factors at a share of the work; the same for all matrices."""
    return split_budget(width, d_model, 1.0 - work, options.inputs).rank


def guess(
    method: GuessMethod,
    block: Block,
    x_TD: Tensor,
    work: float,
    options: GuessOptions,
    seed: int = 0,
) -> LayerGuess | LayerRemainder:
    """Find what a method needs for one block.

    Args:
        method: predictor (Deja Vu), polar, low_rank_gate or r_sparse.
        block: a gated block, in fp32.
        x_TD: its inputs on calibration tokens, without the first of each document. The last quarter
            is held out of training: on one half of it predictors are chosen, on the other judged.
        work: share of the block's work, the guess included; polar's follows from its recall.
        options: the others.
        seed: of a predictor's first factors.
    """
    if method == "r_sparse":
        return _remainder(block, x_TD, work, options)
    part = len(x_TD) // 8
    count = neurons_for(work, options, block.d_model, block.width)
    share = None if options.labels == "positive" else count / block.width
    if method == "low_rank_gate":
        scores = whitened_scores(block, x_TD[: -2 * part], options.rank)
        wanted_TF = label(block, x_TD[-part:], "strongest", count / block.width)
        return _judged(LayerGuess(scores, count), block, x_TD[-part:], wanted_TF)
    labels_TF = label(block, x_TD, options.labels, share)
    training = Training(options.rank, method == "polar", epochs=options.epochs, seed=seed)
    trained = train_predictor(
        x_TD[: -2 * part],
        labels_TF[: -2 * part],
        (x_TD[-2 * part : -part], labels_TF[-2 * part : -part]),
        count,
        training,
    )
    found = LayerGuess(trained.scores, count)
    if method == "polar":
        scored_TF = trained.scores(x_TD[-2 * part : -part])
        wanted_TF = labels_TF[-2 * part : -part]
        found = replace(
            found, count=smallest_count(scored_TF, wanted_TF, options.recall, _MULTIPLE)
        )
    return _judged(found, block, x_TD[-part:], labels_TF[-part:])


def _judged(found: LayerGuess, block: Block, x_TD: Tensor, labels_TF: Tensor) -> LayerGuess:
    """Measure a guess on tokens that it has not seen."""
    scores_TF = found.scores(x_TD)
    parts_TF = contributions(block.hidden(x_TD), block.down)
    return replace(
        found,
        recall=recall_at(scores_TF, labels_TF, found.count),
        energy=energy_at(scores_TF, parts_TF, found.count),
    )


def _remainder(block: Block, x_TD: Tensor, work: float, options: GuessOptions) -> LayerRemainder:
    assert block.gate is not None
    weights = {"gate": block.gate, "up": block.up, "down": block.down}
    split = split_budget(block.width, block.d_model, 1.0 - work, options.inputs)
    factors = {name: low_rank(each, split.rank) for name, each in weights.items() if split.rank}
    hidden_channels = round(split.channels / block.d_model * block.width)
    none = x_TD.new_zeros(len(x_TD), dtype=torch.bool)
    limits = {
        "input": channel_thresholds(block.gate, x_TD, split.channels),
        "up_input": channel_thresholds(block.up, x_TD, split.channels),
    }
    found = LayerRemainder(limits, factors, Shares())
    gate_TF = found._product("gate", "input", block.gate, x_TD, none)
    hidden_TF = block.act(gate_TF) * found._product("up", "up_input", block.up, x_TD, none)
    limits["hidden"] = channel_thresholds(block.down, hidden_TF, hidden_channels)
    read = {
        name: float(passes(x_TD, limits[name]).float().mean()) for name in ("input", "up_input")
    }
    read["hidden"] = float(passes(hidden_TF, limits["hidden"]).float().mean())
    return LayerRemainder(
        limits, factors, Shares(read["input"], 1.0, read["up_input"], read["hidden"])
    )
