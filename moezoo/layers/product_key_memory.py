"""Product-key memory: a key-value memory of n² slots in the place of a feed-forward block.

``y = Σ_h Σ_{i in I_h} softmax(s_h)_i V_i``, with ``I_h`` the k slots whose keys match the query
``q_h(x)`` best (Lample et al. 2019, arXiv:1907.05242, eq. 2-4).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from moezoo.feed_forward import Method, Paper, register
from moezoo.init import init_linear
from moezoo.layers.memory_layer import MemoryLayer
from moezoo.routing.product_key import KeyInit
from moezoo.routing.query_network import QueryNorm
from moezoo_kernels.linear import Linear


class ProductKeyMemory(MemoryLayer):
    """Multi-head product-key memory with batch-normalised queries.

    With ``query_norm="batch"`` a token's output depends, in training only, on the other tokens of
    the batch through its mean and variance.

    A call's ``stats``: ``tokens``; ``usage``, the fraction of slots read; ``top1_usage``, of slots
    that were some head's best; ``unevenness``, the divergence in nats of the slots' summed weights
    from uniform; ``expert_counts`` (n²,) if there are at most 4096 slots. It has no losses.

    Args:
        d_model: width of the residual stream.
        num_keys: half-keys n per codebook, for n² slots; default d_model / 2, no fewer than
            top_k and no more than 512, the paper's number at its width of 1024.
        num_heads: queries per token, each with codebooks of its own.
        top_k: slots that each head reads.
        d_key: width of a query; default the even number nearest above d_model / 4, the paper's
            256 at its width.
        v_dim: width of a value; default d_model. Another width adds an output projection.
        query_norm: batch (the paper's), layer, qk (queries and keys to unit length) or none.
        query_bias: whether the query's linear map has a bias; a batch norm would subtract it.
        value_pool: name of a value table that is shared by the layers that name it; see
            :func:`moezoo.shared_values`. By default a layer has its own.
        sparse: give the values sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        value_lr_multiplier: learning rate of the values, as a multiple of the run's; 4 in the
            paper (1e-3 and 2.5e-4, section 4.2). It follows no schedule, and they do not decay.
        clip_values_apart: clip the gradient of the values by a norm of its own, and the rest of the
            model by the norm of the rest, as the authors' trainer does.
    """

    most_keys: ClassVar[int] = 512
    d_key_divisor: ClassVar[int] = 4
    key_init: ClassVar[KeyInit] = "lample"

    def __init__(
        self,
        d_model: int,
        *,
        num_keys: int | None = None,
        num_heads: int = 4,
        top_k: int = 32,
        d_key: int | None = None,
        v_dim: int | None = None,
        query_norm: QueryNorm = "batch",
        query_bias: bool = False,
        value_pool: str | None = None,
        sparse: bool = False,
        value_lr_multiplier: float = 4.0,
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
        self.out_proj: nn.Linear | None = None
        if self.v_dim != d_model:
            self.out_proj = Linear(self.v_dim, d_model, bias=False)
            init_linear(self.out_proj, self.v_dim**-0.5)

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise as the paper's code does, at any depth; a shared table is its owner's."""
        self.memory.reset_parameters()
        if self.out_proj is not None:
            init_linear(self.out_proj, self.v_dim**-0.5)

    def project(self, read_TV: Tensor, x_TD: Tensor | None = None) -> Tensor:
        """Project what was read where its width is not that of the residual stream."""
        return read_TV if self.out_proj is None else self.out_proj(read_TV)


register(
    Method(
        "product_key_memory",
        ProductKeyMemory,
        Paper("Lample et al.", 2019, "Large Memory Layers with Product Keys", "1907.05242"),
    )
)
