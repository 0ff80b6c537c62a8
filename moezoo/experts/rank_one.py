"""N experts of one hidden neuron each, kept as rows of tables (PEER; He 2024, arXiv:2407.04153).

``y = Σ_j w_j e_{i_j}(x)`` with ``e_i(x) = act(u_i · x) v_i``, or, for gated linear units,
``e_i(x) = act(a_i · x) (u_i · x) v_i`` with ``a`` the table ``gate``.

Shapes: T tokens, D d_model, N experts, J experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int
from moezoo.init import output_std
from moezoo_kernels import rank_one_experts
from moezoo_kernels.activations import ACTIVATIONS, activate
from moezoo_kernels.dtypes import autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RankOneExperts(nn.Module):
    """Tables of single-neuron experts, without biases.

    Args:
        d_model: input and output width D.
        num_experts: number of experts N.
        experts_per_token: how many a token runs; scales the initial ``v``.
        activation: a key of ``moezoo_kernels.activations.ACTIVATIONS``.
        gated: gated linear units: a third table ``gate``.
        sparse: whether the tables' gradients are sparse tensors.

    Attributes:
        mesh: the ranks that share the tables' rows, after :meth:`shard`.
    """

    can_shard = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        experts_per_token: int,
        *,
        activation: str,
        gated: bool,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model)
        self.num_experts = check_int("num_experts", num_experts)
        self.experts_per_token = check_int("experts_per_token", experts_per_token)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.sparse = sparse
        self.mesh: DeviceMesh | None = None
        self.u = nn.Parameter(torch.empty(num_experts, d_model))
        self.v = nn.Parameter(torch.empty(num_experts, d_model))
        self.gate = nn.Parameter(torch.empty(num_experts, d_model)) if gated else None
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw u and gate from N(0, 1/d), v from N(0, 1/J) / sqrt(2 num_layers), in place."""
        for table in (self.u, self.gate):
            if table is not None:
                nn.init.normal_(table, std=self.d_model**-0.5)
        nn.init.normal_(self.v, std=output_std(self.experts_per_token, num_layers))

    def forward(self, x_TD: Tensor, indices_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's experts, ``(T, D)``; index -1 adds nothing."""
        if self.mesh is None:
            tables = (self.u, self.v, self.gate)
            return self._run(x_TD, indices_TJ, weights_TJ, *tables)
        from moezoo.parallel import TokenGather, own

        gather = TokenGather(len(x_TD), self.mesh)
        rows = self.num_experts // self.mesh.size()
        indices_NJ = gather.all_gather(indices_TJ) - rows * self.mesh.get_local_rank()
        elsewhere = (indices_NJ < 0) | (indices_NJ >= rows)
        partial_ND = self._run(
            gather.all_gather(autocast(x_TD)),
            indices_NJ.masked_fill(elsewhere, -1),
            gather.all_gather(weights_TJ),
            own(self.u),
            own(self.v),
            None if self.gate is None else own(self.gate),
        )
        return gather.scatter(partial_ND).sum(dim=0)

    def _run(
        self,
        x_TD: Tensor,
        indices_TJ: Tensor,
        weights_TJ: Tensor,
        u: Tensor,
        v: Tensor,
        gate: Tensor | None,
    ) -> Tensor:
        return rank_one_experts(
            x_TD,
            u,
            v,
            indices_TJ,
            weights_TJ,
            activation=self.activation,
            gate=gate,
            sparse=self.sparse,
        )

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this rank's rows of the tables; see :func:`moezoo.parallel.shard_experts`.

        Raises:
            InputError: the ranks do not divide the rows, or gradients are sparse.
        """
        from moezoo.parallel import split_parameters

        if self.sparse:
            raise InputError("sparse: tables that ranks share have no sparse gradients; set false")
        split_parameters(self, mesh, 0, "num_experts")
        self.mesh = mesh

    def reference(self, x_TD: Tensor, indices_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        """Run all N experts on every token and weight them by a dense matrix (T, N)."""
        dense_TN = weights_TJ.new_zeros(x_TD.shape[0], self.num_experts + 1)
        dense_TN = dense_TN.scatter_add(1, indices_TJ + 1, weights_TJ)[:, 1:]
        inner = x_TD @ self._whole(self.u).t()
        if self.gate is not None:
            inner = torch.cat([x_TD @ self._whole(self.gate).t(), inner], dim=-1)
        answers_TN = activate(inner, self.activation, self.gated)
        return (dense_TN.to(x_TD.dtype) * answers_TN) @ self._whole(self.v)

    def _whole(self, table: Tensor) -> Tensor:
        if self.mesh is None:
            return table
        from moezoo.parallel import whole

        return whole(table)

    def flops_per_assignment(self) -> int:
        """Return the forward FLOPs of one token in one expert: 2 d per table."""
        return 2 * self.d_model * (3 if self.gated else 2)
