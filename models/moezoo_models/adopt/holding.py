"""A SparseMoE that computes with the parameters of a block of transformers, in its place.

The block stays in the model with its class, its children and its parameters; only its ``forward``
is ours. So whatever goes by names or classes goes on as before: state dicts, ``save_pretrained``,
optimizers, hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForwardOutput
from moezoo.layers.sparse_moe import SparseMoE
from moezoo_models.adapters.torch import has_forward_hooks, kept_in
from moezoo_models.adopt.block import Block
from moezoo_models.adopt.layouts import as_it_is

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shared(NamedTuple):
    """A tensor of the block that the layer computes with.

    Attributes:
        ours: its name in the layer.
        theirs: its name in the block.
        view: from theirs to ours.
        hidden: the axis of theirs that hidden neurons are along, if any.
        unit: how many there are of one expert; the axis is as long, or a multiple.
        others: names of more tensors, which the view takes after the first and copies.
    """

    ours: str
    theirs: str
    view: Callable[..., Tensor] = as_it_is
    hidden: int | None = None
    unit: int = 1
    others: tuple[str, ...] = ()

    @property
    def all_theirs(self) -> tuple[str, ...]:
        """The names of theirs, in the block."""
        return (self.theirs, *self.others)


class _Link:
    """A shared tensor: where it is in the block, in parts or whole, and where the layer looks."""

    def __init__(self, layer: SparseMoE, block: nn.Module, shared: Shared) -> None:
        self.view = shared.view
        self.parts = []
        for theirs in shared.all_theirs:
            path, _, name = theirs.rpartition(".")
            self.parts.append((path, block.get_submodule(path), name))
        _, self.owner, self.name = self.parts[0]
        module_path, _, self.ours = shared.ours.rpartition(".")
        self.module = layer.get_submodule(module_path)
        self.place = kept_in(self.module, self.ours)

    def bind(self, block: nn.Module) -> None:
        """Hand the layer what the block has now."""
        for path, owner, _ in self.parts:
            if block.get_submodule(path) is not owner:
                raise InputError(
                    f"adopt: {path} of {type(block).__name__} was replaced after it was adopted, "
                    "and its weights would not be used; undo(), replace it, and adopt then"
                )
        tensor = self.view(*(getattr(owner, name) for _, owner, name in self.parts))
        if self.place[self.ours] is not tensor:
            self.place[self.ours] = tensor


class Held:
    """The ``forward`` of an adopted block.

    Args:
        block: the block.
        entry: of the table.
        layer: a layer with the block's options, whose tensors hold nothing.
        shared: all of them.
        factor: what the block multiplies the sum with, beside the layer's own scale.
    """

    def __init__(
        self,
        block: nn.Module,
        entry: Block,
        layer: SparseMoE,
        shared: list[Shared],
        factor: float = 1.0,
    ) -> None:
        self.block, self.entry, self.layer, self.shared = block, entry, layer, shared
        self.factor = factor
        parts = block.named_modules()
        self.dropouts = [(n, part) for n, part in parts if isinstance(part, nn.Dropout)]
        self.caught: list[FeedForwardOutput] | None = None
        self._links = [_Link(layer, block, tensor) for tensor in shared]
        self._bypassed = bypassed(block, entry)
        self.bind()

    def bind(self) -> None:
        """Hand the layer the block's parameters as they are now.

        Raises:
            InputError: a part was replaced since, or somebody wants to see it called.
        """
        for link in self._links:
            link.bind(self.block)
        for path, part in self._bypassed:
            if has_forward_hooks(part) or "forward" in vars(part):
                raise InputError(
                    f"adopt: {path} of {type(self.block).__name__} was given hooks or a forward "
                    "pass of its own, which an adopted block does not run; undo(), or remove them"
                )
        if self.layer.training != self.block.training:
            self.layer.train(self.block.training)

    def step(self) -> None:
        """Move the layer's state by its load, in the block too: a bias of 16 bits is widened."""
        for link in self._links:
            bias = getattr(link.owner, link.name)
            if link.ours == "selection_bias" and bias.itemsize < 4:
                with torch.no_grad():
                    bias.data = bias.data.float()
        self.bind()
        self.layer.step()

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        """Copy with the model; views of its parameters are made anew from the copy's."""
        for link in self._links:
            if link.place[link.ours] is not getattr(link.owner, link.name):
                link.place[link.ours] = torch.empty(0)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        self.bind()
        return copied

    def views(self) -> bool:
        """Return whether the experts' tensors are views of the block's and not these themselves."""
        experts = [link for link in self._links if link.module is self.layer.experts]
        return any(link.place[link.ours] is not getattr(link.owner, link.name) for link in experts)

    def shard_experts(self, mesh: DeviceMesh) -> None:
        """Split the experts over the ranks of a mesh, in the block too."""
        self.layer.experts.shard(mesh)
        for link in self._links:
            if link.module is self.layer.experts:
                setattr(link.owner, link.name, link.place[link.ours])

    def parts(self) -> dict[nn.Module, Any]:
        """Return the modules whose ``forward`` is replaced, each with what replaces it."""
        return {self.block: self}

    def install(self) -> None:
        """Compute in the block's place."""
        for module, forward in self.parts().items():
            module.forward = forward

    def is_installed(self) -> bool:
        """Return whether nothing has replaced it since."""
        return all(vars(module).get("forward") == f for module, f in self.parts().items())

    def remove(self) -> None:
        """Restore the block's own forward pass."""
        for module in self.parts():
            del module.forward

    def try_out(self, hidden: Tensor) -> Any:
        """Compute what the block does, without being in its place."""
        return self(hidden)

    def theirs(self, hidden: Tensor) -> Any:
        """Compute what :meth:`try_out` does by the block's own forward pass."""
        return type(self.block).forward(self.block, hidden)

    def refuse_dropout(self) -> None:
        """Refuse to train where the block would drop hidden neurons.

        Raises:
            InputError: names the module.
        """
        for name, dropout in self.dropouts:
            if self.block.training and dropout.p:
                raise InputError(
                    f"model: {name} of {type(self.block).__name__} drops hidden neurons in "
                    "training, which a SparseMoE does not; set its p to 0, or call model.eval()"
                )

    def context_of(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return what the layer is given beside hidden states, from what the block is."""
        return {}

    def caught_of(self, output: FeedForwardOutput) -> Tensor:
        """Return the hidden states of an output, which is kept while outputs are collected."""
        if self.caught is not None:
            self.caught.append(output)
            if self.layer.training:
                self.layer.observe(output.stats)
        return output.hidden

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would."""
        self.bind()
        self.refuse_dropout()
        layer = self.layer
        if self.entry.in_one_row:  # which its tokens may come in, too
            hidden_states = hidden_states.reshape(-1, layer.d_model)
        context = self.context_of(*args, **kwargs)
        if layer.training or self.caught is not None or has_forward_hooks(layer):
            answer = self.caught_of(layer(hidden_states, **context))
        else:
            answer = layer.infer(hidden_states, **context)
        if self.factor != 1.0:
            answer = answer * self.factor
        entry, block = self.entry, self.block
        if entry.added is not None:
            answer = answer + getattr(block, entry.added)
        if entry.after is not None:
            answer = getattr(block, entry.after)(answer)
        if entry.flattened or entry.in_one_row:
            answer = answer.flatten(0, -1 if entry.in_one_row else -2)
        router = getattr(block, entry.router_at)
        if entry.second is None and not has_forward_hooks(router):
            return answer
        # Whoever records router logits hooks on to the router, which therefore has to be called.
        given = [getattr(block, name, None) for name in entry.passed]
        tokens = hidden_states.flatten(0, -2) if entry.flat else hidden_states
        if layer.training and layer.router.jitter:
            tokens = tokens.clone()  # some multiply it in place
        routed = router(tokens, *given, *context.values())
        if entry.second is None:
            return answer
        second = routed[entry.second]
        return answer, second.flatten() if entry.in_one_row else second


def bypassed(block: Any, entry: Block) -> list[tuple[str, nn.Module]]:
    """List the parts of a block that are not called once it is adopted, by their names.

    The router is, for whoever records its logits.
    """
    called: tuple[nn.Module, ...] = (block, getattr(block, entry.router_at))
    if entry.in_layer:
        called = (*called, getattr(block, entry.experts_at))
    if entry.after is not None:
        called = (*called, *getattr(block, entry.after).modules())
    return [(path, part) for path, part in block.named_modules() if part not in called]


def build_layer(
    d_model: int, arguments: dict[str, Any], kind: type[SparseMoE] = SparseMoE
) -> SparseMoE:
    """Build a layer whose tensors hold nothing yet."""
    with torch.device("meta"):
        return kind(d_model, **arguments)
