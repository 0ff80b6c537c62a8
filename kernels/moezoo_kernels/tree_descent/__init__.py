"""Hard decisions in binary trees: which leaf, its MLP, or the neurons along the path.

Node i has the children 2 i + 1 and 2 i + 2; behind the last level are the leaves, numbered from
the left (Belcak and Wattenhofer 2023, arXiv:2308.14711 and 2311.10770).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moezoo_kernels import backends, native, triton_support
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_kernels.tree_descent import by_level, op, reference

# From so many tokens times hidden units per leaf on, matrix products win: bf16 ones on CPUs.
_MANY_PER_LEAF = 16384


def tree_descent(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Follow each token down a tree: right where ``w_n · x + b_n >= 0``, else left.

    One row of ``weight`` is read per token and level. The arithmetic is fp32 whatever autocast
    says (fp64 for fp64 tokens); there is no gradient. Backends sum in different orders, so a
    logit within rounding of zero may decide differently.

    Args:
        x: ``(T, D)`` tokens, any floating dtype.
        weight: ``(N, D)`` with N = 2^depth - 1 nodes.
        bias: ``(N,)``, ``weight``'s dtype.

    Returns:
        ``(T,)`` int64, leaves from 0 to N.

    Raises:
        ValueError: shapes or dtypes do not fit, or a forced backend cannot run.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"tree_descent: give x (T, D) and weight (N, D), not {shapes}")
    _check_nodes("weight", len(weight), least=0)
    _check("bias", bias, weight, (len(weight),))
    return _choose("tree_descent", x, weight)(x, weight, bias)


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
    """Return for each token the output of its leaf, a narrow MLP: ``grouped_mlp`` with one expert.

    For token t with leaf ``e = leaves[t]``::

        y[t] = w_out[e] @ act(w_in[e] @ x[t] + bias_in[e]) + bias_out[e]

    or zero where the leaf is -1. The fused backends have no backward: where a gradient is wanted,
    ``grouped_mlp`` runs in their place. They compute in fp32, under autocast too; the result has
    the dtype of ``x``, or of autocast.

    Args:
        x: ``(T, D)`` tokens.
        leaves: ``(T,)`` int64, -1 for none.
        w_in: ``(E, I, D)``, with I = 2 F if gated (the gate's rows first), else F.
        w_out: ``(E, D, F)``.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        gated: whether the leaves are gated linear units.
        bias_in: ``(E, I)`` or None.
        bias_out: ``(E, D)`` or None.

    Returns:
        ``(T, D)``.

    Raises:
        ValueError: shapes or dtypes do not fit, a leaf is out of range, unknown activation, or a
            forced backend cannot run.
    """
    _check_activation(activation)
    if x.ndim != 2 or w_out.ndim != 3 or leaves.shape != x.shape[:1]:
        shapes = f"x {tuple(x.shape)}, leaves {tuple(leaves.shape)}, w_out {tuple(w_out.shape)}"
        raise ValueError(f"leaf_mlp: give x (T, D), leaves (T,), w_out (E, D, F), not {shapes}")
    if leaves.dtype != torch.int64:
        raise ValueError(f"leaves: dtype is {leaves.dtype}; give torch.int64")
    if w_in.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"w_in: dtype is {w_in.dtype}, x has {x.dtype}; cast one of them")
    num_leaves, _, hidden = w_out.shape
    inner = 2 * hidden if gated else hidden
    _check("w_out", w_out, w_in, (num_leaves, x.shape[1], hidden))
    _check("w_in", w_in, w_out, (num_leaves, inner, x.shape[1]))
    _check("bias_in", bias_in, w_in, (num_leaves, inner))
    _check("bias_out", bias_out, w_in, (num_leaves, x.shape[1]))
    many = len(x) * hidden >= _MANY_PER_LEAF * num_leaves
    wins = x.device.type != "cpu" or w_in.dtype == torch.bfloat16
    prefer = "torch" if many and wins else None
    return _choose("leaf_mlp", x, w_in, prefer)(
        x,
        leaves,
        w_in,
        w_out,
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
    """Sum the outputs of the neurons that each token meets on its way down every tree.

    A node is a neuron: with ``a_n = in_weight[n] · x + in_bias[n]``, the way goes right where
    ``a_n > 0``, and ``act(a_n) out_weight[n]`` is added, at the last level too. N = 2^(depth + 1)
    - 1 neurons of a tree, of which depth + 1 are read. The fused backends have no backward: where
    a gradient is wanted, plain torch runs in their place. The decisions are fp32 whatever autocast
    says (fp64 for fp64 tokens).

    Args:
        x: ``(T, D)`` tokens.
        in_weight: ``(P, N, D)``, P trees.
        in_bias: ``(P, N)``, of the same dtype, as is:
        out_weight: ``(P, N, D)``.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        asking: ``(T, D)``, what decides instead of the tokens, without gradient.

    Returns:
        ``(T, D)``, fp32 or fp64, and ``(T, P)`` int64: the last neurons, counted from the left.

    Raises:
        ValueError: shapes or dtypes do not fit, unknown activation, or a forced backend cannot
            run.
    """
    _check_activation(activation)
    if x.ndim != 2 or in_weight.ndim != 3 or x.shape[1] != in_weight.shape[2]:
        shapes = f"x {tuple(x.shape)}, in_weight {tuple(in_weight.shape)}"
        raise ValueError(f"path_neurons: give x (T, D) and in_weight (P, N, D), not {shapes}")
    _check_nodes("in_weight", in_weight.shape[1], least=1)
    _check("in_bias", in_bias, in_weight, in_weight.shape[:2])
    _check("out_weight", out_weight, in_weight, in_weight.shape)
    if asking is not None and asking.shape != x.shape:
        raise ValueError(f"asking: shape is {tuple(asking.shape)}, x has {tuple(x.shape)}")
    run = _choose("path_neurons", x, in_weight)
    return run(x, in_weight, in_bias, out_weight, activation=activation, asking=asking)


def _fused_descent(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
    return op.tree_descent(x.detach(), weight.detach(), bias.detach(), backend)


def _fused_leaf_mlp(
    x: Tensor,
    leaves: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str,
    gated: bool,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    backend: str,
) -> Tensor:
    if _wants_gradient(x, w_in, w_out, bias_in, bias_out):
        return by_level.leaf_mlp(
            x,
            leaves,
            w_in,
            w_out,
            activation=activation,
            gated=gated,
            bias_in=bias_in,
            bias_out=bias_out,
        )
    answer = op.leaf_mlp(x, leaves, w_in, w_out, bias_in, bias_out, activation, gated, backend)
    return answer.to(_output_dtype(x))


def _fused_path_neurons(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    *,
    activation: str,
    asking: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    asking = None if asking is None else asking.detach()
    operands = (in_weight, in_bias, out_weight)
    if _wants_gradient(x, *operands):
        return by_level.path_neurons(x, *operands, activation=activation, asking=asking)
    return op.path_neurons(x, asking, *operands, activation, backend)


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _choose(name: str, x: Tensor, weight: Tensor, prefer: str | None = None) -> Callable[..., Any]:
    dtype = torch.float64 if x.dtype == torch.float64 else weight.dtype
    return backends.choose(name, x.device, dtype, prefer=prefer)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: '{activation}' is not known; choose from: {known}")


def _check_nodes(name: str, num_nodes: int, least: int) -> None:
    if num_nodes < least or num_nodes & (num_nodes + 1):
        raise ValueError(f"{name}: {num_nodes} nodes are no complete tree; give 2^depth - 1")


def _check(name: str, tensor: Tensor | None, like: Tensor, shape: Sequence[int]) -> None:
    """Hold one parameter to the shape that the others ask for, and to the dtype of another."""
    if tensor is None:
        return
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: shape is {tuple(tensor.shape)}, the others ask for {tuple(shape)}"
        )
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name}: dtype is {tensor.dtype}, others have {like.dtype}; cast one")


def _everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Log once that there could be kernels, then run plain torch."""

    def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
        possible = x.device.type == "cpu" and x.dtype != torch.float64
        if possible and not torch.compiler.is_compiling():
            native.warn_once()
        return function(x, *arguments, **options)

    return run


for _name, _function in (
    ("tree_descent", _fused_descent),
    ("leaf_mlp", _fused_leaf_mlp),
    ("path_neurons", _fused_path_neurons),
):
    backends.register(
        _name,
        backends.Backend("cpu", partial(_function, backend="cpu"), native.unusable),
        backends.Backend("triton", partial(_function, backend="triton"), triton_support.unusable),
        backends.Backend("torch", _plain(getattr(by_level, _name)), _everywhere),
        backends.Backend("reference", getattr(reference, _name), _everywhere),
    )

__all__ = ["leaf_mlp", "path_neurons", "tree_descent"]
