"""``grouped_mlp`` for CPUs: some experts at a time, through blocks that stay in cache.

A fresh buffer costs a CPU more than the arithmetic on it (page faults). So an expert's rows go
through gather, both products, activation and combine before the next expert's, and only what the
backward needs is written in full. Experts of few rows do so together, as each pass costs a call and
wakes all threads. Additions into a token run in expert order: deterministic.

In bf16 and fp16, oneDNN generates machine code for each shape that it multiplies, in 5 to 10 times
the time of the product, and keeps the last 1,024. Numbers of routed rows hardly ever recur, so
products of these dtypes have some rows more than are wanted, which makes their shapes few.

Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F,
N assignments, n assignments of one expert, r >= n rows of its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo_kernels import fresh, native
from moezoo_kernels.grouped_matmul import groups
from moezoo_kernels.grouped_mlp import whole
from moezoo_kernels.grouped_mlp.assignments import Assignments
from moezoo_kernels.grouped_mlp.operands import Experts, Gradients, Needs
from moezoo_kernels.grouped_mlp.rowwise import RowPasses
from moezoo_kernels.grouped_products import is_whole
from moezoo_kernels.layouts import StackedGradient, is_transposed

# At most so many slots, in all and per expert, are multiplied one by one as the weights are read.
# A product of matrices catches up as slots share an expert; in bf16 sooner, where processors have
# instructions for it.
_FEW_SLOTS = 1024
_FEW_PER_EXPERT = {torch.float32: 16, torch.bfloat16: 2}

_CACHE = 1 << 20  # bytes of pre-activations of experts that are run together


def forward(
    x: Tensor,  # (T, D)
    experts: Experts,
    weights: Tensor,  # (T, K)
    assignments: Assignments,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) and, if ``keep``, the pre-activations (N, I), else (0, I)."""
    if is_whole(x.dtype):
        return whole.forward(x, experts, weights, assignments, keep)
    w_in, w_out, bias_in, bias_out, unit = experts
    passes = RowPasses(x.dtype, *unit)
    output = torch.zeros(x.shape, dtype=passes.accumulation)
    inner = x.new_empty(assignments.order.numel() if keep else 0, w_in.shape[1])
    tokens = assignments.tokens
    row_weights = weights.reshape(-1)[assignments.order].to(passes.accumulation)
    batches = _batches(assignments.ends, w_in, x.dtype)
    in_DI, out_FD = (_each(w.transpose(1, 2), batches) for w in (w_in, w_out))
    for together in batches:
        first, last = together[0][1], together[-1][2]
        tokens_n, rows = tokens[first:last], rows_multiplied(last - first, x.dtype)
        x_rD = _gather(x, tokens_n, rows)
        if keep and first + rows <= len(inner):
            # Rows beyond the expert's own are the next one's, which writes them afterwards.
            inner_rI = fresh.about_to_write(inner[first : first + rows])
        else:
            inner_rI = x.new_empty(rows, w_in.shape[1])
        _products(x_rD, in_DI, bias_in, together, inner_rI)
        if keep and first + rows > len(inner):
            inner[first:last] = inner_rI[: last - first]
        hidden_rF = passes.activate(inner_rI)
        # The gathered rows are not read any more: the answers take their memory.
        _products(hidden_rF, out_FD, bias_out, together, x_rD)
        weights_n = row_weights[first:last]
        passes.combine(output, tokens_n, x_rD[: last - first], weights_n, len(together))
    return output.to(x.dtype), inner


Together = list[tuple[int, int, int]]
"""Experts that are run at once, each with the first and the last of its rows, exclusive."""


def _batches(ends: Tensor, w_in: Tensor, dtype: torch.dtype) -> list[Together]:
    """Put experts in their order together as long as their pre-activations stay in cache.

    In 16 bits each is alone, as its products have more rows than it has (see above).
    """
    most = 0 if dtype.itemsize < 4 else _CACHE // (w_in.shape[1] * dtype.itemsize)
    found: list[Together] = []
    for expert in groups(ends):
        if found and expert[2] - found[-1][0][1] <= most:
            found[-1].append(expert)
        else:
            found.append([expert])
    return found


def _each(stack: Tensor, batches: list[Together]) -> Tensor | tuple[Tensor, ...]:
    """Return an expert's matrix by its number: if most are wanted, cut out all at once."""
    return stack.unbind(0) if 2 * sum(map(len, batches)) > len(stack) else stack


def _products(
    rows: Tensor,
    matrices: Tensor | tuple[Tensor, ...],
    biases: Tensor | None,
    together: Together,
    out: Tensor,
) -> None:
    """Multiply each expert's rows by its matrix and add its bias, into ``out``."""
    for (e, _, _), own, into in zip(
        together, _parts(rows, together), _parts(out, together), strict=True
    ):
        if biases is None:
            torch.mm(own, matrices[e], out=into)
        else:
            torch.addmm(biases[e], own, matrices[e], out=into)


def _parts(tensor: Tensor, together: Together) -> tuple[Tensor, ...]:
    """Cut a tensor into the rows of each expert; if it is one, rows beyond its own stay."""
    if len(together) == 1:
        return (tensor,)
    return tensor.split([end - start for _, start, end in together])


def rows_multiplied(wanted: int, dtype: torch.dtype) -> int:
    """Return of how many rows to make a product of which so many are wanted.

    In bf16 and fp16, it is the next multiple of 16, or of a 16th of the largest power of two below:
    at most 16 shapes between one power and the next.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return wanted
    step = max(16, 1 << wanted.bit_length() >> 5)
    return -(-wanted // step) * step


def _gather(source: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Return the tokens' rows, and zeros up to a number of rows."""
    if rows == len(tokens):
        return source.index_select(0, tokens)
    gathered = source.new_empty(rows, source.shape[1])
    gathered[len(tokens) :] = 0
    torch.index_select(source, 0, tokens, out=gathered[: len(tokens)])
    return gathered


def is_few(slots: int, num_experts: int, dtype: torch.dtype) -> bool:
    """Return whether so many slots are run by :func:`few`: no batch, and few per expert."""
    return slots <= min(_FEW_SLOTS, _FEW_PER_EXPERT.get(dtype, 0) * num_experts)


def lie_for_few(w_in: Tensor, w_out: Tensor) -> bool:
    """Return whether :func:`few` reads the weights where they are, instead of copying them all."""
    contiguous = w_in.is_contiguous() and w_out.is_contiguous()
    return contiguous or (is_transposed(w_in) and is_transposed(w_out))


def few(x: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (T, D) of a few tokens, and their pre-activations (T K, I) in fp32.

    No sort, no copy, no product of matrices, also where both stacks are transposed. The caller has
    checked the indices; the pre-activations of a slot of -1 are uninitialised.
    """
    w_in, w_out, bias_in, bias_out, unit = experts
    _, width, hidden_width = w_out.shape
    inner = native.floats(indices.numel(), w_in.shape[1])
    transposed = is_transposed(w_in) and is_transposed(w_out)
    if transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    hidden = native.floats(indices.numel(), hidden_width)
    output = native.floats(*x.shape)
    operands = (x, w_in, w_out, bias_in, bias_out)
    native.call(
        "moezoo_grouped_mlp_few",
        *(None if t is None else t.contiguous() for t in operands),
        native.dtype_code(x.dtype),
        indices.contiguous(),
        weights.float().contiguous(),
        *indices.shape,
        width,
        hidden_width,
        *unit.encode(),
        transposed,
        inner,
        hidden,
        output,
    )
    return output.to(x.dtype), inner


def backward(
    grad: Tensor,  # (T, D)
    inner: Tensor,  # (N, I)
    x: Tensor,
    experts: Experts,
    weights: Tensor,
    assignments: Assignments,
    needs: Needs,
) -> Gradients:
    """Return the gradients, recomputing the activation from the pre-activations ``inner``."""
    if is_whole(x.dtype):
        return whole.backward(grad, inner, x, experts, weights, assignments, needs)
    w_in, w_out, bias_in, bias_out, unit = experts
    passes = RowPasses(x.dtype, *unit)
    accumulation = passes.accumulation
    grad_x = torch.zeros(x.shape, dtype=accumulation) if needs.x else None
    ends = assignments.ends
    grad_w_in = StackedGradient(w_in, ends) if needs.w_in else None
    grad_w_out = StackedGradient(w_out, ends) if needs.w_out else None
    grad_bias_in = _gradient(bias_in, needs.bias_in, ends)
    grad_bias_out = _gradient(bias_out, needs.bias_out, ends)
    tokens = assignments.tokens
    row_weights = weights.reshape(-1)[assignments.order].to(accumulation)
    grad_N = row_weights.new_empty(row_weights.shape)
    batches = _batches(ends, w_in, x.dtype)
    in_ID, out_DF = _each(w_in, batches), _each(w_out, batches)
    for together in batches:
        first, last = together[0][1], together[-1][2]
        tokens_n, weights_n = tokens[first:last], row_weights[first:last]
        n, rows = last - first, rows_multiplied(last - first, x.dtype)
        grad_rD = _gather(grad, tokens_n, rows)
        grad_rF = grad_rD.new_empty(rows, w_out.shape[2])
        of_output = _parts(grad_rD, together)
        for (e, _, _), own, into in zip(
            together, of_output, _parts(grad_rF, together), strict=True
        ):
            torch.mm(own, out_DF[e], out=into)
        hidden_rF, grad_inner_rI, grad_n = passes.backward(grad_rF, inner[first:last], weights_n)
        grad_N[first:last] = grad_n
        x_rD = _gather(x, tokens_n, rows) if grad_w_in is not None else torch.empty_like(grad_rD)
        of_hidden, of_inner = _parts(hidden_rF, together), _parts(grad_inner_rI, together)
        of_input = _parts(x_rD, together)
        for i, (e, start, end) in enumerate(together):
            if bias_out is not None and (needs.weights or grad_bias_out is not None):
                own_nD = of_output[i][: end - start]
                if needs.weights:
                    grad_N[start:end] += (own_nD.to(accumulation) * bias_out[e]).sum(-1)
                if grad_bias_out is not None:
                    weighted_nD = own_nD * row_weights[start:end, None]
                    grad_bias_out[e] = weighted_nD.sum(0, dtype=accumulation)
            if grad_w_out is not None:
                grad_w_out.write(e, of_output[i], of_hidden[i])
            if grad_w_in is not None:
                grad_w_in.write(e, of_inner[i], of_input[i])
            if grad_bias_in is not None:
                own_nI = of_inner[i][: end - start]
                grad_bias_in[e] = own_nI.sum(0, dtype=accumulation)
            if grad_x is not None:  # in the memory of the gathered rows, which nobody reads now
                torch.mm(of_inner[i], in_ID[e], out=of_input[i])
        if grad_x is not None:
            passes.combine(grad_x, tokens_n, x_rD[:n], None, len(together))
    grad_weights = None
    if needs.weights:
        used = int(assignments.ends[-1]) if assignments.ends.numel() else 0
        grad_weights = weights.new_zeros(weights.numel())
        grad_weights[assignments.order[:used]] = grad_N[:used].to(weights.dtype)
    return Gradients(
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_w_in is None else grad_w_in.whole,
        None if grad_w_out is None else grad_w_out.whole,
        None if grad_weights is None else grad_weights.view(weights.shape),
        grad_bias_in,
        grad_bias_out,
    )


def _gradient(parameter: Tensor | None, needed: bool, ends: Tensor) -> Tensor | None:
    """Return a buffer for a gradient of biases, written only where an expert is unused: zeros."""
    if parameter is None or not needed:
        return None
    return fresh.stacked(parameter.shape, parameter.dtype, ends)
