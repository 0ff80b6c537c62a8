"""The layer API: what every feed-forward replacement in the zoo promises.

A layer takes the hidden states of a transformer block and returns hidden states of the same
shape, together with the auxiliary losses and statistics of that call. What is to be remembered
between calls goes through :meth:`FeedForward.observe`, so a layer may be recomputed under
activation checkpointing, compiled, or used twice in one process without double counting.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moezoo.arguments import build, plain, select_layers, signature
from moezoo.calls import checked, flatten_tokens
from moezoo.context_read import ReadsContext
from moezoo.cost import Cost
from moezoo.errors import InputError, check_int, nearest
from moezoo.parameter_groups import ParameterGroup, set_apart
from moezoo.router_input import FFN_INPUT, RouterInput
from moezoo.token_context import FeedForwardOutput, History, Place, TokenContext

if TYPE_CHECKING:
    from moezoo.routing.stats import SlotLoad


class FeedForward(ReadsContext):
    """A drop-in for a transformer's feed-forward block: ``(..., d_model) -> (..., d_model)``.

    A subclass takes ``d_model`` first and the rest keyword-only, with defaults, stores every
    argument under its own name, and implements :meth:`forward`, :meth:`reference` (or ``_compute``,
    which both call) and :meth:`cost`. Its arguments *are* its configuration: see :meth:`config`.

    Args:
        d_model: width of the residual stream.

    Attributes:
        needs_token_ids: whether a call without ``token_ids`` raises; true where routing reads them.
        reads_router_input: whether ``router_input`` decides which experts a token is routed to.
        reads_positions: whether ``positions`` change anything; only such layers are given them.
        reads_embeddings: whether ``embeddings`` change anything; only such layers are given them.
        added: where a model's ``memory`` adds the layer to a block, as it then reads the residual
            stream itself; None: it is the feed-forward block only.
        added_as: arguments that differ there, unless they are given.
    """

    kind: ClassVar[str] = "feed_forward"
    added: ClassVar[Place | None] = None
    added_as: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward", "reference", "slot_load"):
            if name in vars(cls):
                setattr(cls, name, checked(vars(cls)[name]))

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model)

    @property
    def causal(self) -> bool:
        """Whether a token's output depends on no later token, but for an expert's limited room."""
        return True

    @checked
    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
        history: History | None = None,
        router_state: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Apply the layer.

        Args:
            hidden: ``(..., d_model)``, any floating dtype.
            token_ids: ``(...)`` int64, for layers that route on the token itself.
            router_input: ``(..., d_model)``, read by the router in place of ``hidden``; the experts
                read ``hidden``. Ignored without ``reads_router_input``.
            mask: ``(...)`` bool, true at real tokens. Padding is excluded from routing, losses and
                statistics, and comes back as zeros from routed layers.
            positions: ``(...)`` int64, how many tokens of its document come before a token. Ignored
                without ``reads_positions``.
            embeddings: ``(..., d_model)``, those of the tokens as they enter the model; default:
                ``hidden``. Ignored without ``reads_embeddings``.
            history: of the tokens before those of ``hidden``, with a cache, for layers that
                ``keeps_history``.
            router_state: ``(..., R)``, that of the output of the layer before, for layers that
                ``reads_router_state``; without it they begin with zeros.

        Raises:
            InputError: an argument is of a wrong shape or dtype; the message names it.
        """
        read = (token_ids, router_input, mask, positions, embeddings, history, router_state)
        context = TokenContext(*read)
        return self._compute(hidden, context, False)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Return the ``hidden`` of a call alone, as decoding wants it.

        Layers whose losses, statistics or checks take time beside the computation of one token
        leave them out here. Arguments as for a call, ``positions``, ``embeddings`` and ``history``
        for layers that ask for them; they are not checked.
        """
        output = self(hidden, token_ids=token_ids, router_input=router_input, mask=mask, **more)
        return output.hidden

    @checked
    def reference(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        embeddings: Tensor | None = None,
        history: History | None = None,
        router_state: Tensor | None = None,
    ) -> FeedForwardOutput:
        """Compute the same numbers by brute force, in plain differentiable torch, any dtype.

        Args:
            hidden: as for :meth:`forward`, and likewise the others.
            token_ids: ``(...)`` int64.
            router_input: ``(..., d_model)``.
            mask: ``(...)`` bool.
            positions: ``(...)`` int64.
            embeddings: ``(..., d_model)``.
            history: as there.
            router_state: ``(..., R)``.

        Returns:
            Output, losses and statistics of :meth:`forward`, equal but for rounding.

        Raises:
            InputError: as :meth:`forward`.
        """
        read = (token_ids, router_input, mask, positions, embeddings, history, router_state)
        context = TokenContext(*read)
        return self._compute(hidden, context, True)

    @checked
    @torch.no_grad()
    def slot_load(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> SlotLoad | None:
        """Return the load of each expert, value or neuron in a pass, however many there are.

        For analysis, without gradients, in evaluation mode; before any limit on capacity.

        Args:
            hidden: as for :meth:`forward`, and likewise the others.
            token_ids: ``(...)`` int64.
            router_input: ``(..., d_model)``.
            mask: ``(...)`` bool.
            positions: ``(...)`` int64.
            router_state: ``(..., R)``.

        Returns:
            How many tokens are routed to each of N slots, and with what total weight; None where
            nothing is chosen.

        Raises:
            InputError: as :meth:`forward`.
        """
        context = TokenContext(token_ids, router_input, mask, positions, router_state=router_state)
        return self._slot_load(hidden, context)

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Do what :meth:`forward` and, by brute force, :meth:`reference` return."""
        raise NotImplementedError

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad | None:
        return None

    @property
    def has_slots(self) -> bool:
        """Whether :meth:`slot_load` has something to count."""
        kind, own = type(self), FeedForward
        return kind.slot_load is not own.slot_load or kind._slot_load is not own._slot_load

    def _flatten(
        self, hidden: Tensor, context: TokenContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden states and what the router reads, ``(T, D)``, and the mask ``(T,)``."""
        x_TD, mask_T = flatten_tokens(self, hidden, context.mask)
        if context.router_input is None:
            return x_TD, x_TD, mask_T
        return x_TD, flatten_tokens(self, context.router_input, None)[0], mask_T

    def cost(self) -> Cost:
        """Return parameters, FLOPs and bytes by formula."""
        raise NotImplementedError

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise every parameter and buffer, as the constructor does.

        Args:
            num_layers: depth of the model the layer sits in, for inits that scale with it.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """Group the parameters by the treatment they want; default: no decay for vectors.

        Biases count as vectors also where those of several experts are stacked.
        """
        vectors: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_vector = parameter.ndim < 2 or name.endswith("bias")
                (vectors if is_vector else matrices).append(parameter)
        groups = [
            ParameterGroup("matrices", matrices),
            ParameterGroup("vectors", vectors, weight_decay=False),
        ]
        return [group for group in groups if group.parameters]

    def config(self) -> dict[str, Any]:
        """Return ``{"class_path": …, "init_args": …}``: JSON-able, and enough to build it again."""
        arguments = {name: plain(getattr(self, name)) for name in signature(type(self))}
        return {"class_path": f"moezoo.{type(self).__name__}", "init_args": arguments}

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any], **overrides: Any) -> FeedForward:
        """Build a registered layer from what :meth:`config` returned.

        Args:
            config: a class path (``"moezoo.SparseMoE"``), or a mapping with ``class_path`` and
                optionally ``init_args``.
            overrides: arguments that replace those in ``init_args`` (commonly ``d_model``).

        Raises:
            InputError: unknown layer, unknown argument, or an argument out of range; the message
                names it and proposes the nearest one.
        """
        if isinstance(config, str):
            config = {"class_path": config}
        if not isinstance(config, Mapping) or "class_path" not in config:
            raise InputError(f"ffn: {config!r} has no class_path; write e.g. 'moezoo.SparseMoE'")
        if unknown := set(config) - {"class_path", "init_args", "layers"}:
            key = sorted(unknown)[0]
            raise InputError(f"ffn: unknown key '{key}'{nearest(key, ['class_path', 'init_args'])}")
        layer = registered(config["class_path"])
        return build(layer, {**(config.get("init_args") or {}), **overrides})

    def extra_repr(self) -> str:
        """Show the configuration in ``print(model)``."""
        return ", ".join(f"{k}={v}" for k, v in self.config()["init_args"].items())


class Paper(NamedTuple):
    """The publication of a method; without a number where there is code alone."""

    authors: str
    year: int
    title: str
    arxiv: str


@dataclass(frozen=True)
class Method:
    """One entry of the zoo: a layer class, the arguments that make it this method, its paper.

    Attributes:
        name: as in ``moezoo zoo`` and in recipes, unique.
        layer: the class.
        paper: where the method was published.
        arguments: of the class, beside its defaults.
        router_input: what the paper's block gives to the router.
    """

    name: str
    layer: type[FeedForward]
    paper: Paper
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    router_input: RouterInput = FFN_INPUT

    def build(self, d_model: int, **overrides: Any) -> FeedForward:
        """Build the method at a width, with its paper's defaults.

        Args:
            d_model: width of the residual stream.
            overrides: arguments of the layer that replace the method's.

        Raises:
            InputError: an argument is unknown or out of range; the message names it.
        """
        return build(self.layer, {"d_model": d_model, **self.arguments, **overrides})


_LAYERS: dict[str, type[FeedForward]] = {}
_METHODS: dict[str, Method] = {}


def register(*methods: Method) -> None:
    """Add methods to the zoo, and their layers to what configurations may name.

    Registering the same method again changes nothing.

    Args:
        methods: entries, whose layers are subclasses of :class:`FeedForward`.

    Raises:
        ValueError: a name is taken by another method.
    """
    for method in methods:
        if _METHODS.setdefault(method.name, method) is not method:
            raise ValueError(f"method '{method.name}' is registered already")
        _LAYERS[method.layer.__name__] = method.layer


def _load_layers() -> None:
    """Register the zoo's own layers, which import this module, so that it names none of them."""
    importlib.import_module("moezoo").load()


def zoo() -> tuple[Method, ...]:
    """List the zoo.

    Returns:
        Every method, ordered by its paper's year and arXiv number, then by name.
    """
    _load_layers()
    methods = _METHODS.values()
    return tuple(sorted(methods, key=lambda m: (m.paper.year, m.paper.arxiv, m.name)))


def registered(class_path: str) -> type[FeedForward]:
    """Return the registered layer of that class path (``moezoo.SparseMoE`` or ``SparseMoE``).

    Only registered names are looked up: a checkpoint's configuration cannot import code.

    Raises:
        InputError: no layer has that name; the nearest is proposed.
    """
    _load_layers()
    name = str(class_path).rpartition(".")[2]
    if name not in _LAYERS:
        known = (f"moezoo.{layer}" for layer in _LAYERS)
        raise InputError(f"class_path: no layer '{class_path}'{nearest(f'moezoo.{name}', known)}")
    return _LAYERS[name]


__all__ = [
    "Cost",
    "FeedForward",
    "FeedForwardOutput",
    "History",
    "Method",
    "Paper",
    "ParameterGroup",
    "TokenContext",
    "build",
    "flatten_tokens",
    "register",
    "registered",
    "select_layers",
    "set_apart",
    "zoo",
]
