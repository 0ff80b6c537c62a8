"""Low-rank guesses of which neurons a token needs, before any of them is computed.

Trained (Deja Vu, Liu et al. 2023, arXiv:2310.17157, section 4.1): ``scores = B A x``, without a
nonlinearity, or ``B norm(A x)`` with a layer norm (Polar Sparsity, Shrestha et al. 2025,
arXiv:2505.14884), by binary cross-entropy on labels of calibration tokens. Untrained: the
projection that the activation function reads, at the low rank that errs least on calibration
inputs, ``scores = |act(B A x)| · length``.

Both papers weigh labels so that many more neurons pass one half than are needed, and stop by
recall alone, which a predictor that calls everything needed wins. Here labels count alike, and an
epoch is judged by recall among each token's k highest scores, on tokens that are not trained on.

Shapes: T tokens, D d_model, F neurons, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.convert.carve.block import Block
from moezoo.convert.select.labels import recall_at
from moezoo.errors import InputError, check_int, check_number
from moezoo_kernels.linear import linear

_EPS = 1e-5


@dataclass(frozen=True)
class LowRankScores:
    """Scores of neurons from a low-rank map of a block's input.

    Attributes:
        reduce: A, ``(R, D)``.
        expand: B, ``(F, R)``.
        bias: ``(F,)``, added to ``B A x``; None for none.
        norm: whether ``A x`` passes a layer norm, without weights of its own.
        act: applied to the products, of which then the magnitude counts; None for the products.
        length: ``(F,)``, what magnitudes are multiplied by; None for ones.
    """

    reduce: Tensor
    expand: Tensor
    bias: Tensor | None = None
    norm: bool = False
    act: Callable[[Tensor], Tensor] | None = None
    length: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return ``(T, F)`` scores: the higher, the more a neuron is needed."""
        inner_TR = linear(x_TD, self.reduce)
        if self.norm:
            inner_TR = F.layer_norm(inner_TR, inner_TR.shape[-1:], eps=_EPS)
        scores_TF = linear(inner_TR, self.expand, self.bias)
        if self.act is None:
            return scores_TF
        scores_TF = self.act(scores_TF).abs()
        return scores_TF if self.length is None else scores_TF * self.length

    @property
    def rank(self) -> int:
        """The rank R."""
        return self.reduce.shape[0]


@dataclass(frozen=True)
class Training:
    """How a predictor is trained.

    Attributes:
        rank: R.
        norm: whether a layer norm stands between the factors (Polar Sparsity).
        epochs: passes over the tokens, at most.
        batch: tokens per step.
        lr: learning rate of AdamW, falling to zero along a cosine.
        weight_decay: of AdamW.
        patience: epochs without a better recall after which training ends.
        seed: of the first factors and of the order of tokens.
    """

    rank: int = 128
    norm: bool = False
    epochs: int = 20
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.01
    patience: int = 5
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`~moezoo.InputError` if a number is out of range."""
        for name in ("rank", "epochs", "batch", "patience"):
            check_int(name, getattr(self, name))
        if not check_number("lr", self.lr):
            raise InputError("lr: 0 trains nothing; give more")
        check_number("weight_decay", self.weight_decay)
        check_int("seed", self.seed, minimum=0)


@dataclass(frozen=True)
class Trained:
    """A trained predictor and how it was chosen.

    Attributes:
        scores: the predictor of the best epoch.
        recall: its recall at k on the tokens that it was chosen on.
        epoch: which one was the best, from 1.
    """

    scores: LowRankScores
    recall: float
    epoch: int


@torch.enable_grad()
def train_predictor(
    x_TD: Tensor,
    labels_TF: Tensor,
    held_out: tuple[Tensor, Tensor],
    count: int,
    options: Training = Training(),
    start: LowRankScores | None = None,
) -> Trained:
    """Train ``scores = B A x + b`` by plain binary cross-entropy.

    Args:
        x_TD: inputs of the block, fp32.
        labels_TF: bool, the neurons that each token needs.
        held_out: inputs and labels of other tokens, by whose recall the best epoch is chosen.
        count: k, neurons that a token may have.
        options: how.
        start: factors to begin from; default: A drawn anew and B zero.

    Returns:
        The predictor of the epoch with the highest recall at k on the held-out tokens.

    Raises:
        InputError: options are out of range, or a held-out token is one of those trained on.
    """
    options.check()
    other_TD, other_labels_TF = held_out
    _check_apart(x_TD, other_TD)
    check_int("count", count, maximum=labels_TF.shape[1])
    generator = torch.Generator().manual_seed(options.seed)
    factors = _start(x_TD, labels_TF, options, start, generator)
    reduce, expand, bias = (part.requires_grad_() for part in factors)
    optimizer = torch.optim.AdamW(
        [
            {"params": [reduce, expand], "weight_decay": options.weight_decay},
            {"params": [bias], "weight_decay": 0.0},
        ],
        lr=options.lr,
    )
    batches = -(-len(x_TD) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches * options.epochs)
    best = Trained(_detached(reduce, expand, bias, options.norm), -math.inf, 0)
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(x_TD), generator=generator).to(x_TD.device)
        for rows in order.split(options.batch):
            scores = LowRankScores(reduce, expand, bias, options.norm)(x_TD[rows])
            loss = F.binary_cross_entropy_with_logits(scores, labels_TF[rows].to(scores.dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        now = _detached(reduce, expand, bias, options.norm)
        recall = recall_at(now(other_TD), other_labels_TF, count)
        if recall > best.recall:
            best = Trained(now, recall, epoch)
        if epoch - best.epoch >= options.patience:
            break
    return best


def _start(
    x_TD: Tensor,
    labels_TF: Tensor,
    options: Training,
    start: LowRankScores | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the bias; the bias begins at the log odds of each neuron's labels."""
    rate_F = labels_TF.to(x_TD.dtype).mean(dim=0).clamp(1e-3, 1 - 1e-3)
    bias_F = rate_F.logit()
    if start is not None:
        own = bias_F if start.bias is None else start.bias.clone()
        return start.reduce.clone(), start.expand.clone(), own
    size = float(x_TD.square().mean().sqrt()) * math.sqrt(x_TD.shape[1])
    reduce_RD = torch.randn(options.rank, x_TD.shape[1], generator=generator).to(x_TD)
    expand_FR = x_TD.new_zeros(labels_TF.shape[1], options.rank)
    return reduce_RD / max(size, 1e-30), expand_FR, bias_F


def _detached(reduce: Tensor, expand: Tensor, bias: Tensor, norm: bool) -> LowRankScores:
    factors = reduce.detach().clone(), expand.detach().clone()
    return LowRankScores(*factors, bias.detach().clone(), norm)


def _check_apart(x_TD: Tensor, other_TD: Tensor) -> None:
    """Refuse a held-out part of the very tokens that are trained on."""
    if not len(x_TD) or not len(other_TD):
        raise InputError("held_out: there are no tokens to train or to choose on; give more")
    if x_TD.untyped_storage().data_ptr() != other_TD.untyped_storage().data_ptr():
        return
    first, size = x_TD.storage_offset(), x_TD.numel()
    other, other_size = other_TD.storage_offset(), other_TD.numel()
    if first < other + other_size and other < first + size:
        raise InputError("held_out: some of its tokens are trained on; give other tokens")


def whitened_factors(weight_FD: Tensor, x_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors B, A of rank R that err least on inputs, ``min Σ_t ||(W - B A) x_t||²``.

    By Eckart and Young with the inputs' second moments ``C = S S^T``: the singular vectors U of
    ``W S`` give ``B = U_R`` and ``A = U_R^T W``. The plain singular value decomposition errs least
    only where inputs are as long in all directions.

    Args:
        weight_FD: the matrix W.
        x_TD: inputs.
        rank: R, at most both its dimensions.

    Returns:
        B ``(F, R)`` and A ``(R, D)``, in the dtype of W.

    Raises:
        InputError: the rank is out of range.
    """
    check_int("rank", rank, maximum=min(weight_FD.shape))
    weight, x = weight_FD.double(), x_TD.double()
    moments_DD = x.t() @ x / len(x)
    values, vectors = torch.linalg.eigh(moments_DD)
    root_DD = vectors * values.clamp(min=0).sqrt()
    left_FF = torch.linalg.svd(weight @ root_DD, full_matrices=False).U[:, :rank]
    return left_FF.to(weight_FD.dtype), (left_FF.t() @ weight).to(weight_FD.dtype)


def whitened_scores(block: Block, x_TD: Tensor, rank: int) -> LowRankScores:
    """Return scores by the low-rank gate (or ``up`` of a plain MLP), without training.

    A neuron's score is its guessed ``|act(gate)|`` times ``||W_down[:, j]||`` and, in a gated
    block, the root mean square of its linear branch on the calibration inputs.

    Args:
        block: the dense block.
        x_TD: calibration inputs.
        rank: R.

    Raises:
        InputError: the rank is out of range.
    """
    rows_FD = block.up if block.gate is None else block.gate
    expand, reduce = whitened_factors(rows_FD, x_TD, rank)
    length_F = block.down.norm(dim=0)
    if block.gate is not None:
        length_F = length_F * linear(x_TD, block.up).square().mean(dim=0).sqrt()
    return LowRankScores(reduce, expand, block.bias_in, act=block.act, length=length_F)


def select(block: Block, scores: Callable[[Tensor], Tensor], count: int, x_TD: Tensor) -> Tensor:
    """Return the block's output with each token's ``count`` best neurons only, ``(T, D)``."""
    kept_TK = scores(x_TD).topk(count, dim=1).indices
    hidden_TF = block.hidden(x_TD)
    kept_TF = torch.zeros_like(hidden_TF).scatter(1, kept_TK, hidden_TF.gather(1, kept_TK))
    return linear(kept_TF, block.down, block.bias_out)
