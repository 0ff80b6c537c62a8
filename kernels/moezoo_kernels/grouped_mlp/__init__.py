"""Experts that are MLPs, applied to the tokens that chose them: gather, compute, combine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moezoo_kernels import backends, triton_support
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions
from moezoo_kernels.dtypes import autocast
from moezoo_kernels.grouped_mlp import cpu, op, peers, reference
from moezoo_kernels.grouped_products import is_whole

# On a CPU, below this many rows per expert, a loop over experts costs more than fresh buffers do,
# unless all are run by one call.
# In bf16 and fp16 it pays sooner, as shapes of its products recur.
_FEW_ROWS_PER_EXPERT = 64
_FEW_ROWS_IN_HALF_PRECISION = 32


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    max_assignments: int | None = None,
    glu: GLUOptions = PLAIN_GLU,
    interleaved: bool = False,
) -> Tensor:
    """Sum, over each token's experts, their weighted outputs.

    For token t, slot j and expert ``e = indices[t, j] >= 0``::

        y[t] += weights[t, j] * (w_out[e] @ act(w_in[e] @ x[t] + bias_in[e]) + bias_out[e])

    with ``act`` the activation, or ``act(gate) * up`` of the two halves if gated. A slot of -1
    costs nothing, adds nothing, and its weight gets gradient zero; so do the parameters of an
    expert without a token. Saved for the backward, besides the inputs: the pre-activations
    ``(N, I)`` in ``x``'s dtype, ``(N,)`` and ``(E,)`` int64.

    Products run in the dtype of ``x``, or of autocast (as in ``F.linear``); router weights and the
    sum over a token's experts stay in fp32. Same inputs give bit-identical results and gradients.

    Args:
        x: ``(T, D)`` tokens, fp64, fp32, bf16 or fp16.
        w_in: ``(E, I, D)``, with I = 2 F if gated (the gate's rows first), else F; ``x``'s dtype.
        w_out: ``(E, D, F)``, ``x``'s dtype.
        indices: ``(T, K)`` int64 expert numbers; -1 for no expert.
        weights: ``(T, K)`` router weights, any floating dtype (fp32 is wise).
        activation: a key of :data:`moezoo_kernels.activations.ACTIVATIONS`.
        gated: whether the experts are gated linear units.
        bias_in: ``(E, I)`` or None.
        bias_out: ``(E, D)`` or None.
        max_assignments: an upper bound on how many indices are not -1, if less than T K is known;
            buffers have that many rows (N). Expert-choice routing, with K = E mostly empty
            columns, wants it.
        glu: bounds of a gated linear unit's factors, and a shift of the linear one.
        interleaved: rows of ``w_in`` and numbers of ``bias_in`` are gate and up in turn (2 i and
            2 i + 1 of neuron i, as in GPT-OSS), instead of all gates first. They are read where
            they are.

    Returns:
        ``(T, D)``, in the dtype of ``x`` (or of autocast).

    Raises:
        ValueError: shapes or dtypes do not fit together, an index is out of range, more indices
            than ``max_assignments``, unknown activation, ``glu`` or ``interleaved`` that do not fit
            it, or a forced backend that cannot run.
    """
    x, w_in, w_out = autocast(x), autocast(w_in), autocast(w_out)
    bias_in = None if bias_in is None else autocast(bias_in)
    bias_out = None if bias_out is None else autocast(bias_out)
    _check_unit(activation, gated, glu, interleaved)
    _check(x, w_in, w_out, indices, weights, gated, bias_in, bias_out)
    prefer = _preferred(indices, w_in.shape[0], x.dtype, max_assignments)
    run = backends.choose("grouped_mlp", x.device, x.dtype, prefer=prefer)
    return run(
        x,
        w_in,
        w_out,
        indices,
        weights,
        activation=activation,
        gated=gated,
        bias_in=bias_in,
        bias_out=bias_out,
        max_assignments=max_assignments,
        glu=glu,
        interleaved=interleaved,
    )


def _fused(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gated: bool,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    max_assignments: int | None,
    glu: GLUOptions,
    interleaved: bool,
    backend: str,
) -> Tensor:
    rows = _rows(indices, max_assignments)
    tensors = (x, w_in, w_out, weights, bias_in, bias_out)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    unit = (activation, gated, list(glu.encode()), interleaved)
    arguments = (bias_in, bias_out, *unit, rows, keep, backend)
    return op.forward(x, w_in, w_out, indices, weights, *arguments)[0]


def _preferred(
    indices: Tensor, num_experts: int, dtype: torch.dtype, max_assignments: int | None
) -> str | None:
    """Name the backend that the size of a batch speaks for."""
    if cpu.is_few(indices.numel(), num_experts, dtype):
        return "cpu"
    if indices.device.type == "cpu" and is_whole(dtype):
        return "cpu"
    few = _FEW_ROWS_IN_HALF_PRECISION if dtype.itemsize == 2 else _FEW_ROWS_PER_EXPERT
    return "grouped_mm" if _rows(indices, max_assignments) < few * num_experts else None


def _rows(indices: Tensor, max_assignments: int | None) -> int:
    slots = indices.numel()
    return slots if max_assignments is None else min(slots, max_assignments)


def _check_unit(activation: str, gated: bool, glu: GLUOptions, interleaved: bool) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: '{activation}' is not known; choose from: {known}")
    glu.check(activation, gated)
    if interleaved and not gated:
        raise ValueError("interleaved: there is no gate to interleave with; set gated to true")


def _check(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    gated: bool,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
) -> None:
    if x.ndim != 2 or w_out.ndim != 3 or indices.ndim != 2:
        shapes = f"x {tuple(x.shape)}, w_out {tuple(w_out.shape)}, indices {tuple(indices.shape)}"
        raise ValueError(
            f"grouped_mlp: give x (T, D), w_out (E, D, F), indices (T, K), not {shapes}"
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"indices: dtype is {indices.dtype}; give torch.int64")
    num_experts, width, hidden = w_out.shape
    inner = 2 * hidden if gated else hidden
    tokens, choices = x.shape[0], indices.shape[1]
    _check_shape("x", x, (tokens, width))
    _check_shape("w_in", w_in, (num_experts, inner, width))
    _check_shape("indices", indices, (tokens, choices))
    _check_shape("weights", weights, (tokens, choices))
    _check_shape("bias_in", bias_in, (num_experts, inner))
    _check_shape("bias_out", bias_out, (num_experts, width))
    for name, tensor in (
        ("w_in", w_in),
        ("w_out", w_out),
        ("bias_in", bias_in),
        ("bias_out", bias_out),
    ):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, x has {x.dtype}; cast one of them")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: shape is {tuple(tensor.shape)}, the others ask for {shape}")


def _cpu_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "needs a CPU device"


def _grouped_mm_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "needs a CPU or CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, this device has {major}.{minor}"


def _reference_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _peer(
    package: str, install: str, needs: str | None = None, only: torch.dtype | None = None
) -> Callable[[torch.device, torch.dtype], str | None]:
    """Return a test of why a package's kernels do not run; it does not import the package."""

    def usable(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA device"
        if importlib.util.find_spec(package) is None:
            return f"not installed; {install}"
        if needs is not None and importlib.util.find_spec(needs) is None:
            return f"its {needs} is not installed"
        if only is not None and dtype != only:
            return f"computes in bf16 only, not {str(dtype).removeprefix('torch.')}"
        return None

    return usable


backends.register(
    "grouped_mlp",
    backends.Backend("cpu", partial(_fused, backend="cpu"), _cpu_usable),
    backends.Backend("grouped_mm", partial(_fused, backend="grouped_mm"), _grouped_mm_usable),
    backends.Backend("reference", reference.grouped_mlp, _reference_usable),
    backends.Backend("triton", partial(_fused, backend="triton"), triton_support.unusable),
    backends.Backend(
        "megablocks",
        partial(peers.grouped_mlp, package="megablocks"),
        _peer(
            "megablocks",
            "pip install --no-deps --no-build-isolation megablocks",
            needs="grouped_gemm",
            only=torch.bfloat16,
        ),
    ),
    backends.Backend(
        "scattermoe",
        partial(peers.grouped_mlp, package="scattermoe"),
        _peer("scattermoe", "pip install --no-deps git+https://github.com/shawntan/scattermoe"),
    ),
)

__all__ = ["grouped_mlp"]
