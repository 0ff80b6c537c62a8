"""The check before the timing: a contender whose output differs has no speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.bench.case import Contender

# Relative error in the Euclidean norm that rounding explains: sums are ordered differently, and in
# bf16 intermediate results are rounded in different places.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_OUTPUT = "the output"


@dataclass(frozen=True)
class Answer:
    """A contender's output and gradients, laid out as ours."""

    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest relative error between two answers, and where it is."""

    where: str
    error: float

    def __str__(self) -> str:
        """Return it as the table shows it."""
        return f"differs by {self.error:.1e} in {self.where}"


def answer(contender: Contender, direction: Tensor | None) -> Answer:
    """Compute the output and, if a direction is given, the gradients of ``<output, direction>``."""
    with contender.within():
        if direction is None:
            with torch.no_grad():
                return Answer(contender.forward(), {})
        names = list(contender.operands)
        output = contender.forward()
        if output.shape != direction.shape:
            return Answer(output.detach(), {})
        found = torch.autograd.grad(output, list(contender.operands.values()), direction)
    gradients = {}
    for name, gradient in zip(names, found, strict=True):
        dense = gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient
        gradients[name] = dense
    if contender.as_ours is not None:
        gradients = contender.as_ours(gradients)
    return Answer(output.detach(), gradients)


def difference(ours: Answer, theirs: Answer) -> Difference:
    """Find the largest relative error in the Euclidean norm, over output and gradients."""
    if ours.output.shape != theirs.output.shape:
        return Difference(f"{_OUTPUT}'s shape", float("inf"))
    worst = Difference(_OUTPUT, relative_error(theirs.output, ours.output))
    for name, gradient in ours.gradients.items():
        where = f"the gradient of {name}"
        if name not in theirs.gradients:
            return Difference(f"{where}, which is missing", float("inf"))
        error = relative_error(theirs.gradients[name], gradient)
        if not error <= worst.error:
            worst = Difference(where, error)
    return worst


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest difference that rounding in ``dtype`` explains."""
    return _TOLERANCE[dtype]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the error in the Euclidean norm, as a multiple of the wanted tensor's.

    Whole numbers are equal, or the error is infinite.
    """
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if bool((found == wanted).all()) else float("inf")
    precise = torch.promote_types(wanted.dtype, torch.float32)
    size = torch.linalg.vector_norm(wanted, dtype=precise).item()
    error = torch.linalg.vector_norm(found.to(precise) - wanted.to(precise)).item()
    if not error < float("inf"):
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
