"""A transformer block's parts on one new token of each of a few sequences, each one C++ call.

In decoding the weights of a small model are read in less time than it takes to call operators. So
norm, projections, attention over a cache, feed-forward block and residual sum are done in one call,
whose arguments are prepared once: each function here takes the tensors that stay, and returns what
is called for each token. Everything happens in place, on a residual stream ``hidden``.

They exist on CPUs in fp32 and bf16, where :func:`usable` says so, and have no gradients. The
arithmetic is fp32; results are rounded to the dtype where torch's operators round them.

Shapes: B sequences, D width of the residual stream, H query heads, G key-value heads, C width of a
head, R numbers of a head that are turned, L positions in the cache, P positions with angles, F
hidden width, V rows of the head.

Mixtures have a step of their own: :mod:`moezoo_kernels.moe_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moezoo_kernels import backends, native
from moezoo_kernels.activations import ACTIVATION_CODES, PLAIN_GLU, RELU_UP, GLUOptions
from moezoo_kernels.selective_mlp.cpu import laid, layouts
from moezoo_kernels.selective_mlp.thresholds import Thresholds
from moezoo_kernels.sparse_linear import BlockSparse, GroupSparse

MOST_SEQUENCES = 16
"""With more, products of matrices are faster elsewhere."""


class Linear(NamedTuple):
    """A linear map: weight ``(out, in)`` and bias ``(out,)`` or None."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """An RMSNorm before a part of the block: weight ``(D,)``, and what is added to mean squares."""

    weight: Tensor
    eps: float


class Angles(NamedTuple):
    """Rotary positions: cos and sin ``(P, R)``, the first half of sin negated; places ``(B,)``.

    The first R numbers of a head are turned, all C or fewer.

    ``places`` are the positions of the new tokens, int64, and change in place from call to call.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor


class Cache(NamedTuple):
    """Keys and values ``(B, G, L, C)``, written in place; mask ``(B, L)`` bool or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


def usable(hidden: Tensor, *tensors: Tensor | None) -> bool:
    """Return whether the steps can run on these tensors.

    Args:
        hidden: ``(B, D)``, the residual stream.
        tensors: the weights.
    """
    return (
        native.unusable(hidden.device, hidden.dtype) is None
        and backends.forced() in (None, "cpu")
        and 0 < hidden.shape[0] <= MOST_SEQUENCES
        and all(
            tensor is None
            or (tensor.is_contiguous() and (tensor.dtype, tensor.device) == _kind(hidden))
            for tensor in (hidden, *tensors)
        )
    )


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def attention_step(
    hidden: Tensor,
    norm: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    angles: Angles,
    cache: Cache,
    *,
    scale: float,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    window: int | None = None,
) -> Callable[[int], None]:
    """Prepare ``hidden += out(attend(norm(hidden)))``.

    Args:
        hidden: ``(B, D)``.
        norm: before the projections.
        query: ``(H C, D)``.
        key: ``(G C, D)``.
        value: ``(G C, D)``.
        out: ``(D, H C)``.
        angles: of rotary positions.
        cache: keys and values so far.
        scale: factor on the scores.
        query_norm: ``(C,)``, an RMSNorm of each query head, with the eps of ``norm``; or ``(H C,)``
            with H > 1, one of all heads together.
        key_norm: ``(C,)`` or ``(G C,)``, likewise; None if ``query_norm`` is.
        window: positions that are seen, the new one included; None for all.

    Returns:
        A function of the new token's place in the cache.
    """
    batch, width = hidden.shape
    _, kv_heads, room, head_width = cache.keys.shape
    queries, pairs = query.weight.shape[0], kv_heads * head_width
    scratch = native.floats(batch * (width + 2 * queries + 2 * pairs))
    parts = (query, key, value, out)
    norms_all = query_norm is not None and query_norm.numel() == queries != head_width
    return native.Prepared(
        "moezoo_attention_step",
        hidden,
        norm.weight,
        *(part.weight for part in parts),
        *(part.bias for part in parts),
        query_norm,
        key_norm,
        *angles,
        *cache,
        scratch,
        native.dtype_code(hidden.dtype),
        batch,
        width,
        queries // head_width,
        kv_heads,
        head_width,
        angles.cos.shape[1],
        room,
        window or 0,
        norms_all,
        float(norm.eps),
        float(scale),
    )


def dense_step(
    hidden: Tensor,
    norm: Norm,
    gate: Linear | None,
    up: Linear,
    down: Linear,
    activation: str,
    glu: GLUOptions = PLAIN_GLU,
    *,
    relu_up: bool = False,
    read: Tensor | None = None,
) -> Callable[[], None]:
    """Prepare ``hidden += down(act(gate(x)) * up(x))``, or ``act(up(x))``, of ``x = norm(hidden)``.

    Args:
        hidden: ``(B, D)``.
        norm: before the block.
        gate: ``(F, D)``, or None if the block is not gated.
        up: ``(F, D)``.
        down: ``(D, F)``.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        glu: bounds of the factors, if there is a gate.
        relu_up: whether the linear factor passes a ReLU, in place of ``glu``.
        read: ``(B, D)``, what the norm reads in place of ``hidden``; it may change in place.
    """
    batch, width = hidden.shape
    hidden_width = up.weight.shape[0]
    parts = (gate or Linear(None, None), up, down)  # type: ignore[arg-type]
    return native.Prepared(
        "moezoo_dense_step",
        hidden,
        read,
        norm.weight,
        *(part.weight for part in parts),
        *(part.bias for part in parts),
        native.floats(batch * (width + 3 * hidden_width)),
        native.dtype_code(hidden.dtype),
        batch,
        width,
        hidden_width,
        ACTIVATION_CODES[activation],
        *(RELU_UP if relu_up else glu.encode()),
        float(norm.eps),
    )


def selective_step(
    hidden: Tensor,
    norm: Norm,
    gate: Linear | None,
    up: Linear,
    down: Linear,
    thresholds: Thresholds,
    activation: str,
    glu: GLUOptions = PLAIN_GLU,
    *,
    relu_up: bool = False,
    read: Tensor | None = None,
) -> Callable[[], None]:
    """Prepare what :func:`dense_step` does, of the numbers that exceed thresholds alone.

    It is :func:`moezoo_kernels.selective_mlp` of ``norm(hidden)``. Gate and down (and up, where
    there is no gate or no threshold for it) are read in part where they lie column by column. What
    an activation makes zero is left out without any threshold, too: of up its rows.

    Args:
        hidden: ``(B, D)``.
        norm: before the block.
        gate: ``(F, D)``, or None if the block is not gated.
        up: ``(F, D)``.
        down: ``(D, F)``.
        thresholds: per channel; they are read at each call.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        glu: bounds of the factors, if there is a gate.
        relu_up: whether the linear factor passes a ReLU, in place of ``glu``.
        read: ``(B, D)``, what the norm reads in place of ``hidden``; it may change in place.
    """
    batch, width = hidden.shape
    hidden_width = up.weight.shape[0]
    parts = (gate or Linear(None, None), up, down)  # type: ignore[arg-type]
    weights = [part.weight for part in parts]
    return native.Prepared(
        "moezoo_selective_step",
        hidden,
        read,
        norm.weight,
        *laid(*weights),
        *(part.bias for part in parts),
        *thresholds,
        native.floats(batch * (3 * width + 2 * hidden_width)),
        native.dtype_code(hidden.dtype),
        batch,
        width,
        hidden_width,
        ACTIVATION_CODES[activation],
        *(RELU_UP if relu_up else glu.encode()),
        *layouts(*weights),
        float(norm.eps),
    )


class SparseLinear(NamedTuple):
    """A linear map without its zeros: the packed matrix, and the bias ``(out,)`` or None."""

    matrix: BlockSparse | GroupSparse
    bias: Tensor | None


def sparse_step(
    hidden: Tensor,
    norm: Norm,
    gate: SparseLinear | None,
    up: SparseLinear,
    down: SparseLinear,
    activation: str,
    glu: GLUOptions = PLAIN_GLU,
    *,
    read: Tensor | None = None,
) -> Callable[[], None]:
    """Prepare what :func:`dense_step` does, with matrices of one kind that are packed.

    Args:
        hidden: ``(B, D)``.
        norm: before the block.
        gate: ``(F, D)``, or None if the block is not gated.
        up: ``(F, D)``.
        down: ``(D, F)``.
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        glu: bounds of the factors, if there is a gate.
        read: ``(B, D)``, what the norm reads in place of ``hidden``; it may change in place.
    """
    batch, width = hidden.shape
    hidden_width = up.matrix.shape[0]
    maps = (gate, up, down)
    given = [(None,) * 3 if part is None else part.matrix.tensors for part in maps]
    return native.Prepared(
        "moezoo_sparse_step",
        hidden,
        read,
        norm.weight,
        *(tensor for tensors in zip(*given, strict=True) for tensor in tensors),
        *(None if part is None else part.bias for part in maps),
        native.floats(batch * (width + 2 * hidden_width)),
        native.dtype_code(hidden.dtype),
        *(batch, width, hidden_width),
        *up.matrix.sizes,
        ACTIVATION_CODES[activation],
        *glu.encode(),
        float(norm.eps),
    )


def head_step(hidden: Tensor, norm: Norm, head: Linear) -> Callable[[], Tensor]:
    """Prepare ``head(norm(hidden))``, ``(B, V)``; each call returns a new tensor."""
    (batch, width), rows = hidden.shape, head.weight.shape[0]
    call = native.Prepared(
        "moezoo_head_step",
        hidden,
        norm.weight,
        *head,
        native.floats(batch * (width + rows)),
        native.dtype_code(hidden.dtype),
        batch,
        width,
        rows,
        float(norm.eps),
    )

    def logits() -> Tensor:
        found = hidden.new_empty(batch, rows)
        call(found)
        return found

    return logits
