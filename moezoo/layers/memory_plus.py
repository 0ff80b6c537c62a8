"""Memory+: product-key memory with a gate on what is read, and values that layers share.

``y = (m(x) * silu(x W_1)) W_2`` with ``m`` the product-key lookup (Berges et al. 2024, *Memory
Layers at Scale*, arXiv:2412.09764, section 3).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from moezoo.feed_forward import Method, Paper, register
from moezoo.init import init_linear
from moezoo.layers.memory_layer import MemoryLayer
from moezoo.routing.product_key import KeyInit
from moezoo.routing.query_network import QueryNorm
from moezoo_kernels.linear import Linear


class MemoryPlus(MemoryLayer):
    """Product-key memory with a silu gate, without batch norm.

    The paper puts three of them into a model, evenly spaced, all reading one table: name the
    same ``value_pool`` in each. Keys, queries, ``W_1`` and ``W_2`` are each layer's own.

    A call's ``stats`` are those of :class:`moezoo.ProductKeyMemory`. It has no losses.

    Args:
        d_model: width of the residual stream.
        num_keys: half-keys n per codebook, for n² slots; default d_model / 2, no fewer than
            top_k and no more than 1024, the paper's number.
        num_heads: queries per token, each with codebooks of its own.
        top_k: slots that each head reads.
        d_key: width of a query; default the even number nearest above d_model / 2.
        v_dim: width of a value; default d_model.
        query_norm: none, qk (queries and keys to unit length, for large memories in small
            models), layer or batch.
        query_bias: whether the query's linear map has a bias.
        value_pool: name of a value table that is shared by the layers that name it; see
            :func:`moezoo.shared_values`. By default a layer has its own.
        sparse: give the values sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        value_lr_multiplier: learning rate of the values, as a multiple of the run's (the authors
            set it to 1e-3). It follows no schedule, and they do not decay.
        clip_values_apart: clip the gradient of the values by a norm of its own, and the rest of the
            model by the norm of the rest, as the authors' trainer does.
    """

    most_keys: ClassVar[int] = 1024
    d_key_divisor: ClassVar[int] = 2
    key_init: ClassVar[KeyInit] = "berges"

    def __init__(
        self,
        d_model: int,
        *,
        num_keys: int | None = None,
        num_heads: int = 4,
        top_k: int = 32,
        d_key: int | None = None,
        v_dim: int | None = None,
        query_norm: QueryNorm = "none",
        query_bias: bool = False,
        value_pool: str | None = None,
        sparse: bool = False,
        value_lr_multiplier: float = 1.0,
        clip_values_apart: bool = True,
    ) -> None:
        super().__init__(
            d_model,
            num_keys=num_keys,
            num_heads=num_heads,
            top_k=top_k,
            d_key=d_key,
            v_dim=v_dim,
            query_norm=query_norm,
            query_bias=query_bias,
            value_pool=value_pool,
            sparse=sparse,
            value_lr_multiplier=value_lr_multiplier,
            clip_values_apart=clip_values_apart,
        )
        self.gate_proj = Linear(d_model, self.v_dim, bias=False)
        self.out_proj = Linear(self.v_dim, d_model, bias=False)
        self._reset_projections()

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise as the authors' code does, at any depth; a shared table is its owner's."""
        self.memory.reset_parameters()
        self._reset_projections()

    def _reset_projections(self) -> None:
        for projection in (self.gate_proj, self.out_proj):
            init_linear(projection, self.d_model**-0.5)

    def project(self, read_TV: Tensor, x_TD: Tensor | None = None) -> Tensor:
        """Gate what was read, and project it; without tokens there is no gate."""
        gated_TV = read_TV if x_TD is None else read_TV * F.silu(self.gate_proj(x_TD))
        return self.out_proj(gated_TV)


register(
    Method(
        "memory_plus",
        MemoryPlus,
        Paper("Berges et al.", 2024, "Memory Layers at Scale", "2412.09764"),
        {"value_pool": "memory"},
    )
)
