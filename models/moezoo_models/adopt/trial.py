"""Both computations on random tokens: what is read off a class's source has to be true of it.

A block is tried out on a copy with the same options and the same width but few hidden neurons, and
random weights: a check on the model's own weights would pass where, say, its biases are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo_models.adapters.transformers import set_experts_backend
from moezoo_models.adopt.block import VERSION
from moezoo_models.adopt.holding import Held
from moezoo_models.adopt.reading import hold, otherwise

TOLERANCE = 1e-5
"""How far an output or gradient may be off, relative to its largest element, in fp32."""
_TOKENS = (2, 24)
_HIDDEN = 8
_ROOM, _ROWS = 3, 37


class Difference(NamedTuple):
    """How far two computations differ, relative to the largest element of theirs.

    Attributes:
        output: the largest difference between the outputs.
        gradient: that between the gradients of the input and of each parameter.
    """

    output: float
    gradient: float

    @property
    def largest(self) -> float:
        """The larger of the two; infinite if either is not a number."""
        largest = max(self.output, self.gradient)
        return largest if self.output == self.output and self.gradient == self.gradient else inf


def try_out(held: Held, name: str) -> Difference:
    """Compare a block with the layer that is to compute in its place.

    Args:
        held: the layer, bound to the block.
        name: of the block, for the message.

    Raises:
        InputError: they differ by more than rounding.
    """
    block = small_copy(held)
    with torch.autocast("cpu", enabled=False):  # whatever the model will compute in
        difference = compare(block, hold(block, held.entry, name))
    if not difference.largest <= TOLERANCE:
        found = transformers.__version__
        why = f"transformers {found} computes something else than {VERSION}, which moezoo knows"
        if found == VERSION:
            why = "one of its parts computes something else than its class"
        raise InputError(
            f"model: {name} ({held.entry.name}) differs from moezoo's layer by "
            f"{difference.largest:.0e} on random tokens: {why}{otherwise(held.block)}"
        )
    return difference


def fingerprint(block: nn.Module) -> str:
    """Return what a block's computation depends on beside its weights: two of one are alike."""
    lines = []
    for path, module in block.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, int | float | str | None) and key not in ("layer_idx", "training")
        }
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        lines.append(f"{path} {type(module).__module__}.{type(module)} {plain} {shapes}")
    return "\n".join(lines)


def small_copy(
    held: Held,
    dtype: torch.dtype = torch.float32,
    hidden: int = _HIDDEN,
    backend: str | None = "eager",
) -> nn.Module:
    """Copy a block with random weights on the CPU, and at most ``hidden`` neurons per expert.

    Router logits differ from expert to expert, selection biases are not zero and of both signs,
    and hidden neurons go far enough to be clamped where a class clamps them.
    """
    block = held.block
    shared = {name: tensor for tensor in held.shared for name in tensor.all_theirs}
    memo: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
        shape = list(tensor.shape)
        known = shared.get(path)
        if known is not None and known.hidden is not None:
            few = min(hidden, known.unit)
            shape[known.hidden] = shape[known.hidden] * few // known.unit
        if path == held.entry.table:
            order = torch.rand(_ROWS, held.layer.num_experts, generator=generator).argsort()
            memo[id(tensor)] = order[:, : shape[1]].clone()
            continue
        values = torch.randn(shape, generator=generator, dtype=dtype) * _std(path, held)
        new = nn.Parameter(values, tensor.requires_grad) if _is_parameter(tensor) else values
        memo[id(tensor)] = new
    small = copy.deepcopy(block, memo)
    for path in held.entry.width_at:
        owner, _, name = path.rpartition(".")
        setattr(small.get_submodule(owner), name, min(hidden, held.layer.d_expert))
    router: Any = getattr(small, held.entry.router_at)
    if hasattr(router, "expert_capacity"):  # or no token of so few would be dropped
        router.expert_capacity = _ROOM
    set_experts_backend(small, backend)
    return small.eval()


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _std(path: str, held: Held) -> float:
    """Return the scale of a tensor's random values: hidden neurons are to reach about 12."""
    shared = {name: tensor.ours for tensor in held.shared for name in tensor.all_theirs}
    ours = shared.get(path, "")
    d_model = held.layer.d_model
    if ours.endswith(("gate_up_proj", "gate_proj.weight", "up_proj.weight")):
        return 12 * d_model**-0.5
    if ours.endswith(("down_proj", "down_proj.weight")):
        return 0.1
    if ours in ("gate.weight", "shared_expert_gate.weight"):
        return 1.5 * d_model**-0.5
    return 0.3


def tokens_for(held: Held, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random tokens whose mean is not zero, so that experts differ in their load."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*_TOKENS, held.layer.d_model, generator=generator, dtype=dtype)
    return hidden + 0.5


def compare(block: nn.Module, held: Held) -> Difference:
    """Compare output and gradients of a block and of the layer bound to it."""
    hidden = tokens_for(held, next(block.parameters()).dtype)
    theirs, ours = _computed(block, held.theirs, hidden), _computed(block, held.try_out, hidden)
    first = _error(ours.pop("output"), theirs.pop("output"))
    rest = max(_error(ours[key], theirs[key]) for key in theirs)
    return Difference(first, rest)


def _computed(block: nn.Module, call: Callable[[Tensor], Any], hidden: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of the input and of every parameter."""
    block.zero_grad(set_to_none=True)
    x = hidden.clone().requires_grad_()
    with torch.enable_grad():
        answer = call(x)
        output = answer[0] if isinstance(answer, tuple) else answer
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        (output.reshape(hidden.shape) * direction).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach().reshape(hidden.shape), "input": x.grad}
    for key, parameter in block.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            found[key] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    block.zero_grad(set_to_none=True)
    return found


def _error(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().clamp(min=1e-30)
    return float((ours - theirs).abs().max() / largest)
