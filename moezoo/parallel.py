"""Expert parallelism: tokens are dispatched to the ranks of their experts, outputs combined.

Every rank of a one-dimensional device mesh has tokens of its own and a share of a layer's experts.
Three ways to bring them together, all differentiable, none with a limit on how many tokens go
where:

- :func:`dispatch_tokens` sends a token once to each rank that holds some of its experts (a
  mixture: few experts per token; GShard, arXiv:2006.16668);
- :class:`TokenGather` all-gathers the tokens (product-key layers, whose tokens read hundreds of
  rows: Memory Layers at Scale, arXiv:2412.09764, section 3.2);
- :mod:`moezoo.experts.row_shares` asks the ranks that hold them for rows of a token table, each
  once, and sends their gradients back.

**Gradients.** Data parallelism averages gradients over the ranks. A rank's experts run on the
tokens of all R ranks of the mesh, so their gradient arrives already summed over these; :func:`own`
divides it by R. What is left, the mean over the mesh's other dimensions, is for whoever shards or
replicates there.

Shapes: T tokens of this rank, N tokens that came here, D d_model, K choices, R ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo_kernels import weighted_bag

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Split the experts of every layer in a model over the ranks of a mesh.

    Stacked MLPs (mixtures, hash layers) and the tables of PEER are split by experts, the values of
    memory layers by their width, and the tables of token rows by rows. Parameters become
    ``DTensor`` of the same names and global shapes, so that a checkpoint is the same with and
    without; those with sparse gradients stay plain (:class:`moezoo.experts.row_shares.RowShare`)
    and become ``DTensor`` in state dicts only. The layers' outputs stay what they
    were for the tokens of this rank. All ranks of the mesh must run a layer together, forward and
    backward, each with any number of tokens, none included.

    Args:
        model: holds the layers; equal on all ranks.
        mesh: one-dimensional.

    Returns:
        The modules whose parameters are split now.

    Raises:
        InputError: a number of experts, or a width, is not a multiple of the number of ranks; the
            gradient of a table that is not of tokens is sparse; a table is offloaded.
    """
    stores = [m for m in model.modules() if getattr(m, "can_shard", False)]
    for store in stores:
        shard: Any = store.shard
        shard(mesh)
    return stores


def split_parameters(module: nn.Module, mesh: DeviceMesh, dimension: int, what: str) -> None:
    """Replace each parameter of a module by a ``DTensor`` that is split along a dimension.

    Raises:
        InputError: the ranks do not divide it; the message begins with ``what``.
    """
    from torch.distributed.tensor import DTensor, Shard

    for name, parameter in list(module.named_parameters(recurse=False)):
        size = parameter.shape[dimension]
        if size % mesh.size():
            raise InputError(
                f"{what}: {size} is not a multiple of the {mesh.size()} ranks that share it; "
                "change it, or the strategy's expert_parallel"
            )
        share = parameter.detach().chunk(mesh.size(), dimension)[mesh.get_local_rank()].clone()
        tensor = DTensor.from_local(share, mesh, [Shard(dimension)], run_check=False)
        setattr(module, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def own(parameter: Tensor) -> Tensor:
    """Return this rank's share of a split parameter; its gradient is divided by the ranks."""
    share: Any = parameter
    return divided_gradient(share.to_local(), share.device_mesh.size())


def divided_gradient(x: Tensor, ranks: int) -> Tensor:
    """Return a tensor whose gradient, dense or sparse, is divided by a number of ranks."""
    return _ScaleGradient.apply(x, 1.0 / ranks)


def whole(parameter: Tensor) -> Tensor:
    """Gather a parameter that may be split; all ranks must call this together."""
    gather: Any = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class DispatchedTokens:
    """Tokens that are on their way to the ranks of their experts.

    Attributes:
        x: ``(N, D)``, the tokens that come to this rank.
        indices: ``(N, K)``, the experts of this rank that they are routed to, -1 for none.
        weights: ``(N, K)``.
        assignments: how many indices are not -1.
    """

    def __init__(
        self,
        arrived: tuple[Tensor, Tensor, Tensor, int],
        places_TR: Tensor,
        splits: tuple[list[int], list[int]],
        mesh: DeviceMesh,
    ) -> None:
        self.x, self.indices, self.weights, self.assignments = arrived
        self._places_TR, self._splits, self._mesh = places_TR, splits, mesh

    def combine(self, outputs_ND: Tensor) -> Tensor:
        """Return the experts' outputs to their tokens' ranks and sum each token's: ``(T, D)``."""
        leaving, arriving = self._splits
        returned = exchange(outputs_ND, arriving, leaving, self._mesh)
        ones = torch.ones_like(self._places_TR, dtype=torch.float32)
        return weighted_bag(returned, self._places_TR, ones)


def dispatch_tokens(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, num_experts: int, mesh: DeviceMesh
) -> DispatchedTokens:
    """Send each token to the ranks that hold its experts; others may compute meanwhile.

    Args:
        x_TD: tokens.
        indices_TK: their experts, numbered over all ranks; -1 for none.
        weights_TK: router weights.
        num_experts: experts of all ranks; rank r holds the r-th share of them.
        mesh: the ranks.
    """
    ranks, own_experts = mesh.size(), num_experts // mesh.size()
    rank_TK = torch.where(indices_TK >= 0, indices_TK // own_experts, ranks)
    per_rank_TR = F.one_hot(rank_TK, ranks + 1).sum(dim=1)[:, :ranks]
    goes_RT = (per_rank_TR > 0).T
    counts = torch.stack([goes_RT.sum(dim=1), per_rank_TR.sum(dim=0)], dim=1)
    leaving, arriving, assignments = _agree_on_sizes(counts, mesh)

    rank_N, token_N = goes_RT.nonzero(as_tuple=True)  # by rank, then by token
    # Gathering rows as an embedding does sums the gradient in a fixed order.
    x_ND = F.embedding(token_N, x_TD)
    weights_NK = F.embedding(token_N, weights_TK)
    there_NK = rank_TK[token_N] == rank_N.unsqueeze(-1)
    indices_NK = indices_TK[token_N] - own_experts * rank_N.unsqueeze(-1)
    indices_NK = indices_NK.masked_fill(~there_NK, -1)
    arrived = (
        exchange(x_ND, leaving, arriving, mesh),
        collectives.all_to_all_single(indices_NK, arriving, leaving, mesh),
        exchange(weights_NK, leaving, arriving, mesh),
        assignments,
    )
    row_RT = goes_RT.flatten().cumsum(0).reshape(goes_RT.shape) - 1
    places_TR = torch.where(goes_RT, row_RT, -1).T.contiguous()
    return DispatchedTokens(arrived, places_TR, (leaving, arriving), mesh)


def _agree_on_sizes(counts_R2: Tensor, mesh: DeviceMesh) -> tuple[list[int], list[int], int]:
    """Exchange how many rows and assignments go from rank to rank; waits for the device."""
    theirs_R2 = collectives.all_to_all_single(counts_R2, None, None, mesh)
    both = torch.stack([counts_R2[:, 0], theirs_R2[:, 0], theirs_R2[:, 1]]).tolist()
    return both[0], both[1], sum(both[2])


def exchange(x: Tensor, leaving: list[int], arriving: list[int], mesh: DeviceMesh) -> Tensor:
    """Send rows to each rank, differentiably; the first ``leaving[0]`` go to rank 0, and so on."""
    return collectives.all_to_all_single_autograd(x.contiguous(), arriving, leaving, mesh)


class TokenGather:
    """An all-gather of tokens whose number differs by rank, and the way back of partial outputs.

    Args:
        tokens: T, of this rank; ranks may differ.
        mesh: the ranks.
    """

    def __init__(self, tokens: int, mesh: DeviceMesh) -> None:
        self._mesh, self._tokens = mesh, tokens
        own_count = torch.full((mesh.size(),), tokens, device=mesh.device_type)
        counts = collectives.all_to_all_single(own_count, None, None, mesh)
        self._counts: list[int] = counts.tolist()

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks, ``(T, …)`` to ``(N, …)``; differentiable if floating."""
        ranks, mine = self._mesh.size(), [self._tokens] * self._mesh.size()
        copies = x.unsqueeze(0).expand(ranks, *x.shape).flatten(0, 1)
        if not x.is_floating_point():
            return collectives.all_to_all_single(copies, self._counts, mine, self._mesh)
        return exchange(copies, mine, self._counts, self._mesh)

    def scatter(self, partial_NV: Tensor) -> Tensor:
        """Return what each rank computed for this rank's tokens: ``(N, V)`` to ``(R, T, V)``.

        Summed over the first dimension it is a reduce-scatter.
        """
        ranks, mine = self._mesh.size(), [self._tokens] * self._mesh.size()
        returned = collectives.wait_tensor(exchange(partial_NV, self._counts, mine, self._mesh))
        return returned.reshape(ranks, self._tokens, partial_NV.shape[-1])


__all__ = [
    "DispatchedTokens",
    "TokenGather",
    "dispatch_tokens",
    "divided_gradient",
    "exchange",
    "own",
    "shard_experts",
    "split_parameters",
    "whole",
]
