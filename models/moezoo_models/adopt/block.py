"""What is said of a class of mixture blocks: :data:`moezoo_models.adopt.table.BLOCKS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VERSION = "5.23.0"
"""The release of transformers in whose source the table was read."""


@dataclass(frozen=True)
class Block:
    """A class of mixture blocks.

    Attributes:
        family: folder of its file.
        name: its class.
        router: class of its router.
        experts: class of its experts.
        convention: a key of :data:`moezoo_models.adopt.conventions.CONVENTIONS`.
        layout: a key of :data:`moezoo_models.adopt.layouts.LAYOUTS`.
        unit: a key of :data:`moezoo_models.adopt.units.UNITS`.
        router_at: name of the router within the block.
        weight: the router's weight, ``(E, D)``, within the block.
        experts_at: name of the experts within the block.
        bias: the selection bias within the block, if the convention has one.
        more: other tensors of the router, where the block has them: ours in
            :class:`moezoo.routing.Router`, and theirs.
        reads: weight of the map that reads hidden states, where the router's reads something else.
        shared: name of the shared expert, which a configuration may leave out.
        shared_unit: of the shared expert, where it differs.
        latent: names of the linear maps between which the experts work, if there are any.
        norms: names of the norms of what experts read and of what each returns, if there are any.
        shared_form: a key of :data:`moezoo_models.adopt.layouts.SHARED`.
        shared_gate: name of the linear map whose sigmoid weighs the shared expert.
        passed: attributes of the block that its router is called with, after hidden states.
        flat: whether its router is called with ``(T, D)``; else with ``(B, T, D)``.
        after: name of a module that the block applies to the sum.
        added: name of a bias ``(D,)`` that the block adds to the sum.
        second: which output of its router the block returns beside hidden states, if any.
        flattened: whether it returns hidden states as ``(T, D)``.
        in_one_row: whether it returns hidden states and the second output as one row each.
        in_layer: whether it is a decoder layer, which runs router and experts itself.
        carries: whether it takes and returns a state, which its router adds up over layers.
        skips: whether rows of the router beyond the experts skip, and do not return the token.
        table: of token ids, which chooses experts where the router is of ``table_router``.
        table_router: class of the routers that have it; the convention is the same.
        unit_at: the module that has the activation, if neither experts nor block do.
        unread: parameters that a configuration may add and nothing reads.
        width_at: numbers that have to be an expert's hidden neurons, for the experts to run.
    """

    family: str
    name: str
    router: str
    experts: str
    convention: str
    layout: str = "stacked"
    unit: str = "plain"
    router_at: str = "gate"
    weight: str = "gate.weight"
    experts_at: str = "experts"
    bias: str | None = None
    reads: str | None = None
    more: tuple[tuple[str, str], ...] = ()
    shared: str | None = None
    shared_form: str = "linears"
    shared_unit: str | None = None
    latent: tuple[str, str] | None = None
    norms: tuple[str, str] | None = None
    shared_gate: str | None = None
    passed: tuple[str, ...] = ()
    flat: bool = True
    after: str | None = None
    added: str | None = None
    second: int | None = None
    flattened: bool = False
    in_one_row: bool = False
    in_layer: bool = False
    carries: bool = False
    skips: bool = False
    table: str | None = None
    table_router: str | None = None
    unit_at: str | None = None
    unread: tuple[str, ...] = ()
    width_at: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Module path and name of the class."""
        return f"{module_of(self.family)}.{self.name}"


def module_of(family: str) -> str:
    """Return the module path of a family's file."""
    return f"transformers.models.{family}.modeling_{family}"


def path_of(module: Any) -> str:
    """Return module path and name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
