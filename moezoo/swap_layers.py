"""Put a layer of the zoo into a transformer of another library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moezoo.errors import InputError
from moezoo.experts.values import shared_values
from moezoo.feed_forward import FeedForward, FeedForwardOutput, select_layers
from moezoo.swap_contract import Adapter, Contract
from moezoo.swap_sites import Site, find_sites
from moezoo.swap_trial import try_out, watch


class Swapped(list[FeedForward]):
    """The layers that :func:`swap` put in, first to last; and what they return beside ``hidden``.

    A foreign decoder passes on hidden states only. Losses and statistics are caught for the
    duration of a ``with`` block::

        swapped = moezoo.swap(model, lambda d: moezoo.SparseMoE(d))
        with swapped.collect() as outputs:
            loss = model(**batch).loss
        loss = loss + sum(sum(o.losses.values()) for o in outputs)

    It holds the blocks that were replaced, so that :meth:`undo` can put them back; :meth:`forget`
    frees them.
    """

    def __init__(
        self, sites: list[Site], adapters: list[Adapter], guard: RemovableHandle | None
    ) -> None:
        super().__init__(adapter.layer for adapter in adapters)
        self._adapters = adapters
        self._sites = sites
        self._placed = [_place(adapter) for adapter in adapters]
        self._guard = guard

    @contextmanager
    def collect(self) -> Iterator[list[FeedForwardOutput]]:
        """Catch the outputs of forward passes inside the block, in the order of the calls.

        A recomputation under activation checkpointing happens in the backward pass; run that
        after the block, and it is not counted twice.
        """
        caught: list[FeedForwardOutput] = []
        for adapter in self._adapters:
            adapter.caught = caught
        try:
            yield caught
        finally:
            for adapter in self._adapters:
                adapter.caught = None

    def undo(self) -> None:
        """Put back the blocks that were replaced, with the weights they had.

        If the model has been moved or switched between training and evaluation since, they follow.

        Raises:
            InputError: the blocks were forgotten, or something else stands in their place now.
        """
        if not self._sites:
            raise InputError("undo: the replaced blocks are not held any more; load the model anew")
        for site, adapter in zip(self._sites, self._adapters, strict=True):
            if site.modules()[0] is not adapter:
                raise InputError(f"undo: {site} was replaced again since; undo that first")
        for site, adapter, placed in zip(self._sites, self._adapters, self._placed, strict=True):
            site.restore()
            training, device, dtype = _place(adapter)
            for module in site.original:
                if training != placed[0]:
                    module.train(training)
                if (device, dtype) != placed[1:]:
                    module.to(device=device, dtype=dtype)
        if self._guard is not None:
            self._guard.remove()
        self.forget()

    def forget(self) -> None:
        """Drop the blocks that were replaced; there is no undoing then."""
        self._sites = []


def swap(
    model: nn.Module,
    factory: Callable[[int], FeedForward] | str | Mapping[str, Any],
    where: str | int | list[int] | Callable[[int], bool] = "all",
) -> Swapped:
    """Replace the feed-forward blocks of a decoder, in place.

    Before anything is replaced, the model runs on two rows of four tokens, to see what it hands to
    its blocks and what it expects of them. A block may return its hidden states in a tuple, take
    the residual stream and add it, or consist of two halves; its replacement then does so too.
    What no layer can do is refused, and the model stays as it was: its modules, modes and hooks.

    Args:
        model: a transformers decoder (Llama, Mistral, Qwen, OLMo and others of that shape), with
            or without its language-model head: somewhere in it lies a ``ModuleList`` of blocks
            that each have an ``mlp``, ``feed_forward``, ``ffn``, ``block_sparse_moe`` or
            ``mlp_block``, or ``fc1`` and ``fc2`` (OPT).
        factory: builds a layer from d_model: a function, a class path such as
            ``"moezoo.SparseMoE"``, or ``{"class_path": …, "init_args": …}``.
        where: which layers: ``"all"``, ``"every 2"``, ``3``, ``[3, 7]`` or a function of the index.

    Returns:
        The new layers, with :meth:`Swapped.collect` to catch their losses and
        :meth:`Swapped.undo`. They take the device and dtype of the blocks they replace; nothing
        else in the model changes.

    Raises:
        InputError: no feed-forward blocks were found, one does what no layer can do in its place,
            the layer needs token ids or carries a router's state (which a foreign decoder does not
            pass on) or is not causal, or ``where`` names no layer.
    """
    sites = find_sites(model)
    if callable(where):
        chosen = [index for index in range(len(sites)) if where(index)]
    else:
        chosen = select_layers(where, len(sites))
    if not chosen:
        raise InputError(f"where: no layer of {len(sites)} is chosen")
    depth, kept = len(sites), [site for site in sites if site.number not in chosen]
    sites = [sites[index] for index in chosen]
    routed = _has_routers(model, kept)
    if not routed:
        _refuse_router_logits(model, (), {})
    contracts, runs = watch(model, sites)
    # Build all before replacing any, so that a mistake leaves the model as it was.
    with shared_values():
        adapters = [
            _adapter(factory, contract, depth, site)
            for site, contract in zip(sites, contracts, strict=True)
        ]
    try:
        for site, adapter in zip(sites, adapters, strict=True):
            site.put_whole(adapter)
        if runs:
            try_out(model)
    except BaseException:
        for site in sites:
            site.restore()
        raise
    guard = None
    if not routed:
        guard = model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
    return Swapped(sites, adapters, guard)


def _adapter(
    factory: Callable[[int], FeedForward] | str | Mapping[str, Any],
    contract: Contract,
    num_layers: int,
    site: Site,
) -> Adapter:
    if callable(factory):
        layer = factory(contract.d_model)
    else:
        layer = FeedForward.from_config(factory, d_model=contract.d_model)
    if layer.kind != "feed_forward":
        raise InputError(
            f"factory: {type(layer).__name__} is of kind '{layer.kind}', not feed_forward"
        )
    if layer.needs_token_ids or not layer.causal:
        why = "needs token ids" if layer.needs_token_ids else "is not causal"
        raise InputError(f"factory: {type(layer).__name__} {why}, so it can't be swapped in")
    if layer.reads_router_state:
        raise InputError(
            f"factory: {type(layer).__name__} carries a router's state over layers, which a "
            "foreign decoder does not pass on; set router.logits.carry to false"
        )
    layer.reset_parameters(num_layers)
    replaced = site.original[0]
    like = next((p for p in replaced.parameters() if p.is_floating_point()), torch.empty(0))
    adapter = Adapter(layer, contract).train(replaced.training)
    return adapter.to(device=like.device, dtype=like.dtype)


def _place(adapter: Adapter) -> tuple[bool, torch.device, torch.dtype]:
    like = next((p for p in adapter.parameters() if p.is_floating_point()), torch.empty(0))
    return adapter.training, like.device, like.dtype


def _has_routers(model: nn.Module, kept: list[Site]) -> bool:
    """Return whether a model that can return its routers' logits has any left in these blocks.

    True as well of a model that knows nothing of such logits.
    """
    if not hasattr(getattr(model, "config", None), "output_router_logits"):
        return True
    return any(hasattr(part, "experts") for site in kept for part in site.original)


def _refuse_router_logits(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what would end in an error of the model's: it has no routers of its own any more."""
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(model.config, "output_router_logits", False)
    if asked:
        raise InputError(
            "output_router_logits: the model's own routers are all replaced; set it to false, and "
            "add the new layers' losses from collect()"
        )
