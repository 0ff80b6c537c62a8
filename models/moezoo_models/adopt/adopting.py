"""Mixture blocks of a transformers model, computed by SparseMoE layers with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moezoo.arguments import as_options
from moezoo.errors import InputError
from moezoo.feed_forward import FeedForwardOutput
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions
from moezoo_models.adopt.holding import Held
from moezoo_models.adopt.reading import entry_of, hold, mixtures_of
from moezoo_models.adopt.trial import Difference, fingerprint, try_out

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Adopted:
    """The layers that compute in place of a model's mixture blocks.

    The model's modules, parameters and their names are what they were, and so are its state dict
    and what ``save_pretrained`` writes. Losses and statistics are caught for the duration of a
    ``with`` block::

        adopted = moezoo.adopt(model, balance=moezoo.BalanceOptions(load_balancing=0.01))
        with adopted.collect() as outputs:
            loss = model(**batch).loss
        loss = loss + sum(sum(o.losses.values()) for o in outputs)

    Attributes:
        differences: how far each layer was off on random tokens, by the block's name.
    """

    def __init__(self, held: dict[str, Held], differences: dict[str, Difference]) -> None:
        self._held, self.differences = held, differences
        self._sharded = False
        for one in held.values():
            one.install()

    @property
    def layers(self) -> dict[str, SparseMoE]:
        """The layers by the names of their blocks, for :mod:`moezoo.analysis` and others.

        They compute with the blocks' own parameters. After the model was moved or its parameters
        were replaced, ask again; of DBRX and Switch also after a step of the optimizer, as what
        lies apart there is copied into one tensor.
        """
        for held in self._held.values():
            held.bind()
        return {name: held.layer for name, held in self._held.items()}

    @contextmanager
    def collect(self) -> Iterator[list[FeedForwardOutput]]:
        """Catch the outputs of forward passes inside the block, in the order of the calls.

        In training the layers also take note of their load, for :meth:`step`. A recomputation
        under activation checkpointing happens in the backward pass; run that after the block, and
        it is not counted twice.
        """
        caught: list[FeedForwardOutput] = []
        for held in self._held.values():
            held.caught = caught
        try:
            yield caught
        finally:
            for held in self._held.values():
                held.caught = None

    def step(self) -> None:
        """Move selection biases by the load since the last step; call it after the optimizer."""
        for held in self._held.values():
            held.step()

    def discard(self) -> None:
        """Forget the load since the last step, as when a step is skipped."""
        for layer in self.layers.values():
            layer.discard()

    def shard_experts(self, mesh: DeviceMesh) -> None:
        """Split every layer's experts over the ranks of a mesh (:mod:`moezoo.parallel`).

        The blocks' parameters become ``DTensor`` of the same names and global shapes.

        Args:
            mesh: one-dimensional.

        Raises:
            InputError: a number of experts is not a multiple of the ranks, or experts are stored
                in another layout; nothing is split then.
        """
        for name, held in self._held.items():
            if held.layer.num_experts % mesh.size():
                raise InputError(
                    f"mesh: {name} has {held.layer.num_experts} experts, which {mesh.size()} "
                    "ranks do not divide; give a mesh of another size"
                )
            if held.views():
                raise InputError(
                    f"mesh: {name} stores its experts in another layout, "
                    "and they cannot be split; leave them whole"
                )
        for held in self._held.values():
            held.shard_experts(mesh)
        self._sharded = True

    def undo(self) -> None:
        """Restore the blocks' own forward pass; their weights stay as they are now.

        Raises:
            InputError: experts were split, or a forward pass was replaced again since.
        """
        if self._sharded:
            raise InputError("undo: the experts are split over ranks; load the model anew")
        for name, held in self._held.items():
            if not held.is_installed():
                raise InputError(
                    f"undo: the forward pass of {name} was replaced again since; undo that first"
                )
        for held in self._held.values():
            held.remove()
        self._held = {}


def adopt(
    model: nn.Module,
    *,
    balance: BalanceOptions | Mapping[str, Any] | None = None,
    where: Callable[[str], bool] | None = None,
) -> Adopted:
    """Compute the mixture blocks of a transformers model by :class:`moezoo.SparseMoE`, in place.

    Weights are shared, not copied, but for experts whose parts lie apart (DBRX, Switch): those are
    joined with every pass. Every block is judged before any is changed: it is of a class
    that the options of a SparseMoE can say, and on random tokens, at random weights, its output
    and all gradients differ from the layer's by no more than rounding in fp32 (1e-5). Router
    logits are recorded as before (``output_router_logits``), and so the model's own auxiliary loss
    is what it was.

    Routers compute in fp32 (fp64 in fp64), also where a class does not. In bf16 a token whose
    choices are close may go to other experts than before.

    Args:
        model: as ``from_pretrained`` returns it: mixtures of 70 families, see
            docs/routers.md.
        balance: auxiliary losses of the layers, caught by :meth:`Adopted.collect`, or a mapping of
            such options; default: none.
        where: which blocks, by a function of their names in the model; default: all.

    Returns:
        The layers, with :meth:`Adopted.collect`, :meth:`Adopted.step` and :meth:`Adopted.undo`.

    Raises:
        InputError: an argument is of another kind; there is no mixture block, none is chosen, or
            one cannot be held exactly, as where it drops hidden neurons and is in training; the
            model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model: {type(model).__name__} is no module; give a model that from_pretrained returns"
        )
    if where is not None and not callable(where):
        raise InputError("where: is no function; give one of a block's name, such as a lambda")
    if balance is not None:
        balance = as_options("balance", balance, BalanceOptions)
        balance.check()
    blocks = mixtures_of(model)
    if where is not None:
        chosen = {name: block for name, block in blocks.items() if where(name)}
        if not chosen:
            raise InputError(
                f"where: no block of {len(blocks)} is chosen, such as {next(iter(blocks))}"
            )
        blocks = chosen
    with torch.inference_mode(False):  # gradients are compared
        held = {
            name: hold(block, entry_of(block, name), name, balance)
            for name, block in blocks.items()
        }
        tried: dict[str, Difference] = {}
        differences = {}
        for name, one in held.items():
            key = fingerprint(one.block)
            if key not in tried:
                tried[key] = try_out(one, name)
            differences[name] = tried[key]
        return Adopted(held, differences)


def adopted_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """Return the layers that compute in place of a model's mixture blocks, by the blocks' names."""
    layers = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        held = forward if isinstance(forward, Held) else getattr(forward, "__self__", None)
        if isinstance(held, Held) and module is not getattr(held.block, held.entry.router_at):
            held.bind()
            layers[name] = held.layer
    return layers
