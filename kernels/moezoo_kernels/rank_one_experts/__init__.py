"""N experts of one hidden neuron each, kept as rows of tables: gather, dot, activate, sum.

The experts of PEER (He 2024, arXiv:2407.04153, section 2).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.rank_one_experts import op, reference


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
    """Sum, over each token's experts, their weighted outputs.

    For token t, slot j and expert ``i = indices[t, j] >= 0``::

        y[t] += weights[t, j] * act(u[i] @ x[t]) * v[i]

    or with ``act(gate[i] @ x[t]) * (u[i] @ x[t])`` for ``act(u[i] @ x[t])``. A slot of -1 adds
    nothing, and its weight gets gradient zero. The same expert may stand in several slots of a
    token; its outputs add up. Nothing of size ``(T, J, D)`` is saved or ever exists. Same inputs
    give bit-identical outputs and gradients, with any number of threads.

    Products run in the dtype of the tables or in fp32, whatever autocast says: only the rows that
    are read could be cast, which costs more than it saves. Autocast decides the dtype of the
    output. Weights and pre-activations are fp32 (fp64 for fp64 tables).

    Args:
        x: ``(T, D)`` tokens.
        u: ``(N, D)``.
        v: ``(N, D)``, of ``u``'s dtype.
        indices: ``(T, J)`` int64 expert numbers; -1 for no expert.
        weights: ``(T, J)``.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        gate: ``(N, D)``, of ``u``'s dtype, for gated linear units.
        sparse: give the tables' gradients as sparse tensors of the rows that were read
            (for torch.optim.SparseAdam or SGD); not under torch.compile.

    Returns:
        ``(T, D)``, in the dtype of ``x`` (or of autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together, an index is out of range, unknown
            activation, sparse gradients under torch.compile, or a forced backend that cannot run.
    """
    _check(x, u, v, gate, indices, weights, activation)
    if sparse and torch.compiler.is_compiling():
        raise ValueError("sparse: torch.compile has no sparse gradients; set it to false")
    weights = weights.to(torch.promote_types(u.dtype, torch.float32))
    run = backends.choose("rank_one_experts", x.device, u.dtype)
    output = run(x, u, v, indices, weights, activation=activation, gate=gate, sparse=sparse)
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        output = output.to(torch.get_autocast_dtype(device))
    return output


def _fused(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gate: Tensor | None,
    sparse: bool,
    backend: str,
) -> Tensor:
    if backend == "torch" and not torch.compiler.is_compiling() and _has_kernel(u):
        native.warn_once()
    return op.forward(x, u, v, gate, indices, weights, activation, sparse, backend)[0]


def _check(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: '{activation}' is not known; choose from: {known}")
    if x.ndim != 2 or u.ndim != 2 or indices.ndim != 2:
        shapes = f"x {tuple(x.shape)}, u {tuple(u.shape)}, indices {tuple(indices.shape)}"
        raise ValueError(f"rank_one_experts: give x (T, D), u (N, D), indices (T, J), not {shapes}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices: dtype is {indices.dtype}; give torch.int64")
    tokens, choices = x.shape[0], indices.shape[1]
    wanted = {
        "x": (x, (tokens, u.shape[1])),
        "v": (v, u.shape),
        "gate": (gate, u.shape),
        "indices": (indices, (tokens, choices)),
        "weights": (weights, (tokens, choices)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            expected = tuple(shape)
            raise ValueError(
                f"{name}: shape is {tuple(tensor.shape)}, the others ask for {expected}"
            )
    for name, table in (("v", v), ("gate", gate)):
        if table is not None and table.dtype != u.dtype:
            raise ValueError(f"{name}: dtype is {table.dtype}, u has {u.dtype}; cast one of them")


def _has_kernel(u: Tensor) -> bool:
    return u.device.type == "cpu" and u.dtype in (torch.float32, torch.bfloat16)


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


backends.register(
    "rank_one_experts",
    backends.Backend("cpu", partial(_fused, backend="cpu"), native.unusable),
    backends.Backend("triton", partial(_fused, backend="triton"), triton_support.unusable),
    backends.Backend("torch", partial(_fused, backend="torch"), _anywhere),
    backends.Backend("reference", reference.rank_one_experts, _anywhere),
)

__all__ = ["rank_one_experts"]
