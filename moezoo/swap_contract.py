"""The contract between a foreign layer and its feed-forward block, found by watching."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.feed_forward import FeedForward, FeedForwardOutput
from moezoo.swap_sites import Site


class Call(NamedTuple):
    """One call of a module: what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Contract:
    """The arguments that a block is called with, and the form of its output.

    Attributes:
        d_model: width of the hidden states.
        first: name of the argument that holds them, if they come by name.
        residual: place and name of an argument that the block adds to its output, if any.
        kind: ``tuple`` or ``list`` with the hidden states first, or None for these alone.
        others: how many more there are; they are returned as None.
        flat: whether they are returned as ``(tokens, d_model)`` whatever shape they came in.
    """

    d_model: int
    first: str = "hidden_states"
    residual: tuple[int, str] | None = None
    kind: type[tuple[Any, ...]] | type[list[Any]] | None = None
    others: int = 0
    flat: bool = False

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the hidden states, and what is to be added, of a call."""
        hidden = args[0] if args else kwargs[self.first]
        if self.residual is None:
            return hidden, None
        place, name = self.residual
        return hidden, kwargs[name] if name in kwargs else args[place]

    def give(self, answer: Tensor, residual: Tensor | None) -> Any:
        """Return an output, of the shape of the hidden states, as the block would."""
        if residual is not None:
            answer = answer + residual
        if self.flat:
            answer = answer.reshape(-1, self.d_model)
        return answer if self.kind is None else self.kind([answer, *[None] * self.others])

    def answer(self, output: Any, hidden: Tensor) -> Tensor:
        """Return the hidden states in what the block returned."""
        answer: Tensor = output if self.kind is None else output[0]
        return answer.reshape(hidden.shape)


class Adapter(nn.Module):
    """Stands for a feed-forward block of a foreign model, and keeps its contract.

    Args:
        layer: what runs.
        contract: of the block that it replaces; default: hidden states in and out.
    """

    def __init__(self, layer: FeedForward, contract: Contract | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.contract = contract or Contract(layer.d_model)
        self.caught: list[FeedForwardOutput] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer; keep its losses and statistics while they are collected."""
        hidden, residual = self.contract.read(args, kwargs)
        output = self.layer(hidden)
        if self.caught is not None:
            self.caught.append(output)
        # A tensor of its own: some models add to it in place (Falcon), which would reach into what
        # the layer keeps for its backward pass and its statistics.
        return self.contract.give(output.hidden.clone(), residual)


class Echo(nn.Module):
    """Runs the original block through its contract: the model must not notice."""

    def __init__(self, site: Site, contract: Contract) -> None:
        super().__init__()
        self._parts = (*site.original,)  # a tuple registers none of them here
        self._inline, self._contract = site.inline, contract

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the block does."""
        contract = self._contract
        hidden, residual = contract.read(args, kwargs)
        if self._inline:
            answer = hidden
            for part in self._parts:
                answer = part(answer)
            return contract.give(answer, None)
        main, *others = self._parts
        if residual is not None:
            args, kwargs = _without(contract, args, kwargs)
        answer = contract.answer(main(*args, **kwargs), hidden)
        for part in others:
            answer = answer + part(hidden)
        return contract.give(answer, residual)


def contract_of(site: Site, calls: Mapping[nn.Module, Call]) -> Contract:
    """Read a block's contract from one call of it.

    Args:
        site: where the block stands.
        calls: the first call of each of its parts.

    Raises:
        InputError: it was not called, or does what no layer of the zoo can do in its place.
    """
    first, last = site.original[0], site.original[-1 if site.inline else 0]
    for part in site.original:
        if part not in calls:
            raise InputError(f"model: {site} was not called as one block; replace it by hand")
    call = calls[first]
    names = list(inspect.signature(first.forward).parameters)
    if not call.args and names[0] not in call.kwargs:
        names.insert(0, next(iter(call.kwargs), ""))
    hidden = call.args[0] if call.args else call.kwargs.get(names[0])
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or not hidden.ndim:
        raise InputError(f"model: {site} is not given hidden states first; replace it by hand")
    dropout = getattr(site.block, "activation_dropout", 0.0)
    if site.inline and isinstance(dropout, float) and dropout:
        raise InputError(
            f"model: {site} have activation_dropout {dropout} between them, which would drop from "
            "the new layer's answer; set it to 0"
        )
    kind, others, flat = _structure(site, hidden, calls[last].output)
    residual = None if site.inline else _residual(site, call, names)
    return Contract(hidden.shape[-1], names[0], residual, kind, others, flat)


def _structure(site: Site, hidden: Tensor, output: Any) -> tuple[Any, int, bool]:
    kind, others = None, 0
    if type(output) in (tuple, list) and output:
        kind, others = type(output), len(output) - 1
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(
            f"model: {site} returns {type(output).__name__}, where a layer returns hidden states; "
            "replace it by hand"
        )
    flat = output.shape != hidden.shape
    if flat and output.shape != (hidden.numel() // max(1, hidden.shape[-1]), hidden.shape[-1]):
        raise InputError(
            f"model: {site} turns shape {tuple(hidden.shape)} into {tuple(output.shape)}; a layer "
            "keeps it, so replace it by hand"
        )
    return kind, others, flat


def _residual(site: Site, call: Call, names: list[str]) -> tuple[int, str] | None:
    """Find the argument that a block adds to its output, by calling it with zeros there."""
    block = site.original[0]
    hidden = call.args[0] if call.args else call.kwargs[names[0]]
    given = {names[place] if place < len(names) else "": arg for place, arg in enumerate(call.args)}
    given |= call.kwargs
    found = None
    for name, value in given.items():
        like = isinstance(value, Tensor) and value.shape == hidden.shape
        if name == names[0] or not like or not value.is_floating_point():
            continue
        place = names.index(name) if name in names else -1
        argument = Contract(hidden.shape[-1], residual=(place, name))
        if hidden.is_meta:
            added, read = name == "residual", name != "residual"
        else:
            with torch.no_grad():
                args, kwargs = _without(argument, call.args, call.kwargs)
                rest = _first(block(*args, **kwargs)).reshape(hidden.shape)
            answer = _first(call.output).reshape(hidden.shape)
            read = not torch.equal(rest, answer)
            added = read and same(rest + value, answer)
        if read and (not added or found is not None):
            raise InputError(
                f"model: {site} reads '{name}' beside its hidden states, which no layer of the zoo "
                "does; replace it by hand"
            )
        found = (place, name) if added else found
    return found


def _without(
    contract: Contract, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with zeros for what is to be added."""
    assert contract.residual is not None
    place, name = contract.residual
    if name in kwargs:
        return args, {**kwargs, name: torch.zeros_like(kwargs[name])}
    zeros = torch.zeros_like(args[place])
    return (*args[:place], zeros, *args[place + 1 :]), dict(kwargs)


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal but for the rounding of one sum."""
    if one.shape != other.shape:
        return False
    if one.is_meta or not one.numel():
        return True
    scale = other.abs().nan_to_num(0.0, 0.0, 0.0).max()
    tolerance = 8 * float(scale) * torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
