"""Slices of some neurons, trained dense (S2FT, Yang et al. 2024, arXiv:2412.06289).

A neuron of a feed-forward block is a column of its down projection and a row of gate and up. All is
frozen, and of a few neurons per block, S, one trains what is added to their slices,

    y = W_down h + Δ h_S,    and, if wanted,    u_S = W_up,S x + Δ x,

Δ (D, |S|), or (|S|, D) for rows, zero at first. The paper permutes neurons so that S comes first;
here they are taken by index, and stay where they are. Gradients and the optimizer's state have the
size of Δ, and merging is ``W[:, S] += Δ``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo_kernels.linear import is_plain_linear, linear
from moezoo_train.finetune.lora import weights_hash
from moezoo_train.optim.optimizer import OptimizerConfig

_CHILDREN = {
    "down": ("down_proj", "c_proj", "fc2"),
    "up": ("up_proj", "c_fc", "fc1"),
    "gate": ("gate_proj",),
}
"""Names of a block's projections in the architectures that are known."""

_READS = (*_CHILDREN["up"], "gate_up_proj")
"""By one of these a block is told from other modules with an output projection."""

_OWN = ("delta", "neurons")
"""Last parts of the names of what a sliced projection has beside its weight and bias."""


@dataclass(frozen=True)
class NeuronOptions:
    """Which neurons of each dense block are trained.

    Attributes:
        ratio: share of them; at least one is.
        projections: whose slices: some of ``down``, ``up`` and ``gate``; all have the same neurons.
        seed: chooses them, as many in each block.
    """

    ratio: float = 0.03
    projections: tuple[str, ...] = ("down",)
    seed: int = 0

    def __post_init__(self) -> None:
        if check_number("neurons.ratio", self.ratio, maximum=1.0) == 0:
            raise InputError("neurons.ratio: 0 trains nothing; give e.g. 0.03")
        if not self.projections:
            raise InputError("neurons.projections: there is none; give e.g. [down]")
        for name in self.projections:
            check_choice("neurons.projections", name, tuple(_CHILDREN))
        check_int("neurons.seed", self.seed, minimum=0)


class SlicedLinear(nn.Linear):
    """A frozen linear map and what is added to some of its columns, or rows.

    Made of a linear map in place by :func:`slice_linear`, which keeps its place and its tensors'
    names.

    Attributes:
        delta: what is added: ``(out, |S|)`` to columns, ``(|S|, in)`` to rows.
        neurons: the columns or rows S, ``(|S|,)`` int64, ascending.
        columns: whether S are columns.
    """

    delta: nn.Parameter
    neurons: Tensor
    columns: bool

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole matrix as it computes, for those that read it instead of calling."""
        frozen = self._parameters["weight"]
        assert frozen is not None
        return frozen.index_add(int(self.columns), self.neurons, self.delta.to(frozen.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the map to ``(..., in)``."""
        frozen = self._parameters["weight"]
        assert frozen is not None
        output = linear(input, frozen, self.bias)
        if self.columns:
            return output + linear(input.index_select(-1, self.neurons), self.delta)
        added = linear(input, self.delta)
        return output.index_add(-1, self.neurons, added.to(output.dtype))


def slice_linear(linear: nn.Linear, neurons: Tensor, columns: bool) -> None:
    """Freeze a linear map and train what is added to some of its columns or rows; in place.

    Args:
        linear: the map.
        neurons: which of them, ``(|S|,)`` int64.
        columns: whether they are columns.
    """
    frozen = linear.weight.requires_grad_(False)
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    count = len(neurons)
    shape = (linear.out_features, count) if columns else (count, linear.in_features)
    vars(linear)["columns"] = columns
    linear.__class__ = SlicedLinear
    linear.register_buffer("neurons", neurons.to(frozen.device))
    linear.register_parameter("delta", nn.Parameter(frozen.new_zeros(shape)))


def check_neurons(
    options: NeuronOptions | None,
    base: str | None,
    others: Mapping[str, object | None],
    optimizer: OptimizerConfig,
    compiled: bool,
) -> None:
    """Refuse options that do not go with training neurons.

    Args:
        options: which are trained, if that was asked for.
        base: the directory that the run begins with.
        others: what else may be trained in place of everything, by the names of the options.
        optimizer: how parameters are updated.
        compiled: whether the model is compiled.

    Raises:
        InputError: names the option to change.
    """
    if options is None:
        return
    if base is None:
        raise InputError("neurons: they are of a trained model; set initialize_from")
    for name, other in others.items():
        if other is not None:
            raise InputError(f"neurons: {name} is set too, and one decides; set one to null")
    if optimizer.name == "muon":
        raise InputError(
            "optimizer.name: muon is for whole matrices, not for slices of them; use adamw"
        )
    if compiled:
        raise InputError("compile: has not been tried with neurons; set it to false")


def slice_neurons(model: PreTrainedModel, options: NeuronOptions, base: str) -> None:
    """Freeze a model but for slices of some neurons of each dense block; in place.

    Args:
        model: ours or a stock one. Shared experts are dense blocks, too.
        options: which neurons, and what of them.
        base: the directory it came from, for messages.

    Raises:
        InputError: it has no dense block, or none with such a projection.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise InputError(
            f"neurons: {base} has no dense feed-forward block of plain linear maps; train adapters "
            "by lora instead"
        )
    hashed = weights_hash(model)
    model.requires_grad_(False)
    for number, (name, block) in enumerate(blocks):
        generator = torch.Generator().manual_seed(options.seed * len(blocks) + number)
        width = block["down"].in_features
        count = max(1, round(options.ratio * width))
        neurons = torch.randperm(width, generator=generator)[:count].sort().values
        for projection in options.projections:
            if projection not in block:
                raise InputError(
                    f"neurons.projections: {name} has no '{projection}' of its own; give some of: "
                    f"{', '.join(block)}"
                )
            slice_linear(block[projection], neurons, columns=projection == "down")
    model.sliced_weights = hashed  # type: ignore[assignment]


def describe_neurons(model: PreTrainedModel, options: NeuronOptions | None) -> dict[str, Any]:
    """Describe what is trained, and the weights it is added to; nothing without."""
    if options is None:
        return {}
    return asdict(options) | {"base": model.sliced_weights}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary of the same function without slices; the model keeps its own."""
    merged = {n: t for n, t in model.state_dict().items() if not of_slice(n)}
    for name, module in model.named_modules():
        if isinstance(module, SlicedLinear):
            own = {f"{name}.{last}" for last in _OWN}
            assert not own & merged.keys()
            merged[f"{name}.weight"] = module.weight.detach()
    return merged


def of_slice(name: str) -> bool:
    """Return whether a tensor of a state dictionary is a slice, or says which neurons it is of."""
    return name.rpartition(".")[2] in _OWN


def _blocks(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Linear]]]:
    """Go through the dense blocks that have plain linear maps, and those."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not any(is_plain_linear(children.get(each)) for each in _READS):
            continue
        block = {
            projection: child
            for projection, names in _CHILDREN.items()
            for each in names
            if is_plain_linear(child := children.get(each))
        }
        # Experts that all tokens share have no neuron in mixtures that have none of them.
        if "down" in block and block["down"].in_features:
            yield name, block
