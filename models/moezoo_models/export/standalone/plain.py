"""What takes the place of kernels, ranks and the gate where there is no moezoo: plain torch.

Each has the arguments of what it stands for, so that the code around it is copied as it is.

Shapes: T tokens, K choices, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward
from moezoo_kernels.grouped_linear.reference import grouped_linear as linear_of_rows
from moezoo_kernels.grouped_linear.reference import grouped_linear_sum as linear_sum_of_rows
from moezoo_kernels.grouped_linear.reference import sum_by_token as sum_of_rows
from moezoo_kernels.grouped_mlp.reference import grouped_mlp
from moezoo_kernels.rank_one_experts.reference import rank_one_experts as rank_one_of_tables
from moezoo_kernels.selective_mlp.reference import selective_mlp as selective_by_rule
from moezoo_kernels.tree_descent.reference import path_neurons as neurons_of_paths
from moezoo_kernels.weighted_bag.reference import weighted_bag as bag_of_rows
from moezoo_models.model.joint_attention import attend_by_formulas

LAYERS: dict[str, type[FeedForward]] = {}
"""The layers that configurations may name, filled at the end of the file."""


def registered(class_path: str) -> type[FeedForward]:
    """Return the layer of that class path (``moezoo.SparseMoE`` or ``SparseMoE``).

    Raises:
        InputError: this file has none of that name.
    """
    name = str(class_path).rpartition(".")[2]
    if name not in LAYERS:
        known = ", ".join(LAYERS)
        raise InputError(f"class_path: no layer '{class_path}'; this file holds {known}")
    return LAYERS[name]


class GatedLoading:
    """Nothing: directories are loaded as transformers does. moezoo looks at their files first."""


class MixtureAttention(torch.nn.Module):
    """Refuses to be built: models with attention by experts get no file of code."""

    def __init__(self, *_: Any) -> None:
        raise InputError("attention_experts: only moezoo has them; set it to null")


def no_deferred_init() -> Any:
    """Return None: models are initialized when they are built."""
    return None


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter, which no ranks share."""
    return parameter


def dispatch_tokens(*_: Any) -> Any:
    """Refuse to send tokens to other ranks.

    Raises:
        InputError: always.
    """
    raise InputError("mesh: experts are shared by ranks in moezoo alone")


def blocks_in_turn(blocks: Iterable[Any], *_: Any) -> Iterable[Any]:
    """Return the blocks; what they read is fetched when they read it."""
    return blocks


class RowFetches:
    """Reads rows of a table in main memory when they are wanted."""

    def read(self, weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return a row for each index, on the indices' device, and each index's place."""
        flat = indices.flatten()
        rows = weight[flat.clamp(min=0).to(weight.device)].to(indices.device)
        places = torch.arange(len(flat), device=indices.device).masked_fill(flat < 0, -1)
        return rows, places.reshape(indices.shape)


Linear = torch.nn.Linear
"""A linear map, by torch's own products."""


def is_plain_linear(module: object) -> bool:
    """Return whether a module is a linear map, and no subclass of it."""
    return type(module) is torch.nn.Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + b``."""
    return F.linear(x, weight, bias)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x Wᵀ``."""
    return F.linear(x, weight)


class HeadLoss(NamedTuple):
    """The loss of a head, in fp32."""

    loss: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int
) -> HeadLoss:
    """Return the mean cross-entropy of ``hidden @ weight.T``, ``(..., V)``."""
    logits = F.linear(hidden, weight).float().flatten(0, -2)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return HeadLoss(total / (labels != ignore_index).sum().clamp(min=1))


class Assignments(NamedTuple):
    """The experts of tokens."""

    indices: Tensor  # (T, K), -1 for none
    num_experts: int


def assign(indices: Tensor, num_experts: int, rows: int | None = None) -> Assignments:
    """Return the assignments, whose rows come in the order of their experts."""
    return Assignments(indices, num_experts)


def grouped_linear(
    x: Tensor, w: Tensor, assignments: Assignments, bias: Tensor | None = None, gather: bool = True
) -> Tensor:
    """Return the products of rows with their experts' matrices, in the order of the experts."""
    return linear_of_rows(x, w, assignments.indices, bias, gather)


def grouped_linear_sum(
    rows: Tensor,
    w: Tensor,
    weights: Tensor,
    assignments: Assignments,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each token's products."""
    return linear_sum_of_rows(rows, w, weights, assignments.indices, bias)


def sum_by_token(rows: Tensor, weights: Tensor, assignments: Assignments) -> Tensor:
    """Return the weighted sum of each token's rows."""
    return sum_of_rows(rows, weights, assignments.indices, assignments.num_experts)


def rank_one_experts(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str = "gelu",
    gate: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Sum, over each token's experts of one neuron, their weighted outputs."""
    weights = weights.to(torch.promote_types(u.dtype, torch.float32))
    return rank_one_of_tables(
        x, u, v, indices, weights, activation=activation, gate=gate, sparse=sparse
    )


class Packing:
    """Packs no matrix: products are dense here."""

    def clear(self) -> None:
        """Do nothing, as there is no copy."""

    def get(self, *_: Any) -> None:
        """Return no packed matrix."""

    def whole(self, _: Any, dense: Callable[[], Tensor]) -> Tensor:
        """Return the matrix with its zeros, made anew."""
        return dense()


def sparse_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with a matrix, all of it."""
    return F.linear(x, matrix, bias)


def is_direct(*_: Any) -> bool:
    """Return that no kernel runs beside torch's operators."""
    return False


def selective_mlp(x: Tensor, *matrices: Any, **options: Any) -> Tensor:
    """Compute a block of the numbers that exceed thresholds, by its rule."""
    return selective_by_rule(x, *matrices, **options)[0]


def weighted_bag(
    table: Tensor, indices: Tensor, weights: Tensor, *, sparse: bool = False
) -> Tensor:
    """Sum weighted rows of a table: ``y[t] = Σ_j weights[t, j] table[indices[t, j]]``."""
    weights = weights.to(torch.promote_types(table.dtype, torch.float32))
    return bag_of_rows(table, indices, weights, sparse=sparse)


def leaf_mlp(
    x: Tensor,
    leaves: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str,
    gated: bool,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> Tensor:
    """Return the output of each token's leaf, an expert with weight one."""
    return grouped_mlp(
        x,
        w_in,
        w_out,
        leaves.unsqueeze(-1),
        torch.ones_like(leaves, dtype=x.dtype).unsqueeze(-1),
        activation=activation,
        gated=gated,
        bias_in=bias_in,
        bias_out=bias_out,
    )


def path_neurons(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    *,
    activation: str,
    asking: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the outputs of the neurons that each token meets on its way down every tree."""
    return neurons_of_paths(x, in_weight, in_bias, out_weight, activation=activation, asking=asking)


def joint_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    answer: Tensor,
    answer_lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention merged with an answer, the context's share, and the joint log-sum-exp."""
    return attend_by_formulas(query, key, value, mask, answer, answer_lse, causal, scaling)[:3]
