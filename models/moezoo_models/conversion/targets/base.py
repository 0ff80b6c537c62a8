"""The base of every format: shapes, the cutting of experts, and refusals.

A target says which dense architectures it can hold without changing their attention, what its
``config.json`` is, and under which names and in which shapes it stores routers and experts. A
model that it cannot hold is refused: nothing is ever dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from moezoo.convert.plan import PROJECTIONS, Expert, LayerPlan, Projection
from moezoo.errors import InputError
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets.mixture import Mixture
from moezoo_models.model.config import check_trained_length

Read = Callable[[int], dict[str, Tensor]]
"""Reads the dense block of a layer; 0, or which of the models where experts are of several."""

Plan = Callable[[], LayerPlan]
"""Makes the plan of a layer, or remembers it."""


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    Attributes:
        name: in the file.
        shape: its shape.
        dtype: its dtype.
        pieces: gives the tensor in consecutive pieces along its first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Target:
    """A format.

    Attributes:
        name: what ``--to`` calls it.
        families: dense architectures whose attention it can hold.
        shared: whether it has a shared expert.
        weightings: of the chosen experts, that it has.
        converts: which layers it can convert, in words.
        flat: whether it writes unit weights as normalized sigmoids of small logits.
        carved: whether it holds routers of carved blocks that are not linear in their input, as
            many experts per token in each layer as it needs, and biases of the output.
    """

    name: str
    families: tuple[str, ...]
    shared = False
    weightings: tuple[str, ...] = ("normalized",)
    converts = "all layers"
    flat = False
    carved = False

    def check(self, source: Source, mixture: Mixture) -> None:
        """Raise :class:`InputError` where this format would not compute what is asked for."""
        if problem := self.refuses(source):
            others = alternatives(source, lambda target: mixture.weighting in target.weightings)
            raise InputError(f"{problem}; {others}")
        if mixture.d_shared and not self.shared:
            others = alternatives(source, lambda target: target.shared)
            raise InputError(f"shared: {self.name} has no shared expert; {others}")
        if mixture.weighting not in self.weightings:
            raise InputError(
                f"weighting: {self.name} has no '{mixture.weighting}' weights; "
                f"it has {', '.join(self.weightings)}"
            )
        kept = (
            ("router: cmoe", mixture.neuron_router),
            ("router: ridge_shared", mixture.reads_shared),
            ("bias: an output bias", mixture.output_bias),
        )
        if any(asked for _, asked in kept) and not self.carved:
            what = next(name for name, asked in kept if asked)
            others = alternatives(source, lambda target: target.carved)
            raise InputError(f"{what} has no place in {self.name}; {others}")
        every = tuple(range(source.num_layers))
        if mixture.layers != every and not self.can_skip(mixture.layers, source.num_layers):
            others = alternatives(
                source, lambda target: target.can_skip(mixture.layers, source.num_layers)
            )
            raise InputError(f"layers: {self.name} converts {self.converts}; {others}")

    def refuses(self, source: Source) -> str | None:
        """Return why this format cannot hold the source; None if it can."""
        if source.family not in self.families:
            return f"to: {self.name} cannot hold the attention of a {source.family}"
        return self.block_problem(source) or self.attention_problem(source)

    def block_problem(self, source: Source) -> str | None:
        """Return why feed-forward blocks of a source of its families are not held."""
        activation = source.config.hidden_act
        if source.ffn["activation"] == "silu":
            return None
        return f"hidden_act: '{activation}' is not silu, which {self.name}'s experts have"

    def attention_problem(self, source: Source) -> str | None:
        """Return why attention of a source of its families is not held; None if it is."""
        return None

    def can_skip(self, layers: tuple[int, ...], num_layers: int) -> bool:
        """Return whether the layers that are not named can stay dense."""
        return False

    def config(self, source: Source, mixture: Mixture) -> dict[str, Any]:
        """Return the contents of ``config.json``."""
        raise NotImplementedError

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """List the tensors of one mixture, in the order they are written.

        Args:
            layer: its number.
            plan: makes its plan; called only when pieces are asked for.
            mixture: the shapes.
            read: reads the dense block.
        """
        raise NotImplementedError


class PerExpert(Target):
    """One tensor per expert and projection, as most stock architectures store them."""

    prefix = "mlp"
    names: ClassVar[Mapping[Projection, str]] = {
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    }
    shared_name = "shared_expert"
    shared_factor = 1.0

    def outputs(self, layer: int, plan: Plan, mixture: Mixture, read: Read) -> Iterator[Output]:
        """List the router, the experts and the shared expert."""
        start = f"model.layers.{layer}.{self.prefix}"
        yield from self.router(f"{start}.gate", plan, mixture)
        for e in range(mixture.num_experts):
            for each in PROJECTIONS:
                yield Output(
                    f"{start}.experts.{e}.{self.names[each]}.weight",
                    mixture.shape(each, mixture.d_expert),
                    mixture.dtype,
                    partial(routed_part, plan, e, each, read),
                )
        yield from shared_outputs(
            f"{start}.{self.shared_name}", plan, mixture, read, self.shared_factor
        )

    def router(self, name: str, plan: Plan, mixture: Mixture) -> Iterator[Output]:
        """List the router's tensors."""
        yield router_output(f"{name}.weight", plan, mixture)


def constant_output(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float = 0.0
) -> Output:
    """Describe a tensor whose elements are all the same."""

    def pieces() -> Iterator[Tensor]:
        yield torch.full(shape, value, dtype=dtype)

    return Output(name, shape, dtype, pieces)


def router_output(name: str, plan: Plan, mixture: Mixture, flat: bool = False) -> Output:
    """Describe the router's weight, ``(N, D)``, wider if it reads the shared expert.

    Args:
        name: in the file.
        plan: whose router it is.
        mixture: the shapes.
        flat: multiply it with the plan's ``flatness``.
    """

    def pieces() -> Iterator[Tensor]:
        yield planned_router(plan(), mixture.dtype, flat)

    return Output(name, (mixture.num_experts, mixture.d_router), mixture.dtype, pieces)


def planned_router(plan: LayerPlan, dtype: torch.dtype, flat: bool) -> Tensor:
    """Return a plan's router as a file has it, ``(N, D)``; arguments as :func:`router_output`."""
    return (plan.router * (plan.flatness if flat else 1.0)).to(dtype)


def selection_bias_output(name: str, plan: Plan, mixture: Mixture) -> Output:
    """Describe the bias ``(N,)`` on sigmoid scores that does what the plan's does on logits.

    With a small factor ε the score of logit z is ``sigmoid(ε z) = 1/2 + ε z / 4`` up to ε³.
    """

    def pieces() -> Iterator[Tensor]:
        bias = plan().router_bias
        yield torch.zeros(mixture.num_experts) if bias is None else bias * (plan().flatness / 4)

    return Output(name, (mixture.num_experts,), torch.float32, pieces)


def shared_outputs(
    name: str, plan: Plan, mixture: Mixture, read: Read, factor: float = 1.0
) -> Iterator[Output]:
    """List the shared expert's tensors, if there is one.

    Args:
        name: before the projections' names.
        plan: whose expert it is.
        mixture: the shapes.
        read: reads the dense block.
        factor: on its output.
    """
    if not mixture.d_shared:
        return
    down: Projection = "down"
    for each in (*mixture.inner, down):
        yield Output(
            f"{name}.{each}_proj.weight",
            mixture.shape(each, mixture.d_shared),
            mixture.dtype,
            partial(_shared_part, plan, each, read, factor),
        )


def empty_shared_outputs(name: str, mixture: Mixture) -> Iterator[Output]:
    """List the tensors of the shared expert that transformers makes even if it has no neurons."""
    for each in PROJECTIONS:
        shape = mixture.shape(each, 0)
        yield Output(f"{name}.{each}_proj.weight", shape, mixture.dtype, lambda: iter(()))


def routed_part(plan: Plan, expert: int, projection: Projection, read: Read) -> Iterator[Tensor]:
    """Cut one routed expert's part out of the dense block."""
    yield _cut(plan().experts[expert], projection, plan, read)


def stacked_outputs(
    gate_up: str, down: str, plan: Plan, mixture: Mixture, read: Read
) -> Iterator[Output]:
    """List the two tensors of formats that stack experts, ``(N, 2 F, D)`` and ``(N, D, F)``.

    Args:
        gate_up: name in the file of gate and up projections, one above the other; of a plain MLP
            up alone, ``(N, F, D)``.
        down: name of the down projections.
        plan: whose experts they are.
        mixture: the shapes.
        read: reads the dense block.
    """
    experts, width, d_model = mixture.num_experts, mixture.d_expert, mixture.d_model
    of_gate_up = partial(_stacked_parts, plan, mixture.inner, read)
    of_down = partial(_stacked_parts, plan, ("down",), read)
    rows = len(mixture.inner) * width
    yield Output(gate_up, (experts, rows, d_model), mixture.dtype, of_gate_up)
    yield Output(down, (experts, d_model, width), mixture.dtype, of_down)


def _stacked_parts(plan: Plan, projections: tuple[Projection, ...], read: Read) -> Iterator[Tensor]:
    """Yield all routed experts' parts one after the other, the layout of one stacked tensor."""
    for expert in plan().experts:
        for each in projections:
            yield _cut(expert, each, plan, read)


def _shared_part(plan: Plan, projection: Projection, read: Read, factor: float) -> Iterator[Tensor]:
    shared = plan().shared
    assert shared is not None
    expert = replace(shared, out_scale=shared.out_scale * factor)
    yield _cut(expert, projection, plan, read)


def _cut(expert: Expert, projection: Projection, plan: Plan, read: Read) -> Tensor:
    weight = read(expert.block)[projection]
    refitted = plan().down
    if projection == "down" and refitted is not None:
        weight = refitted.to(weight.dtype)
    return expert.cut(projection, weight)


_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)


def stock_config(kind: Callable[..., Any], source: Source, **fields: Any) -> dict[str, Any]:
    """Return a configuration of what all architectures share and of what this one has.

    Args:
        kind: transformers' configuration class.
        source: the dense model.
        fields: those of this architecture.
    """
    dense = source.config
    trained = check_trained_length(source.raw.get("trained_length"), dense.max_position_embeddings)
    if trained is not None:
        fields["trained_length"] = trained
    common = {name: getattr(dense, name) for name in _COPIED}
    config = kind(**common, rope_parameters=_rope(source), **fields)
    config.architectures = [kind.__name__.removesuffix("Config") + "ForCausalLM"]
    return config.to_diff_dict()


def _rope(source: Source) -> dict[str, Any]:
    """Return rotary parameters; where layers have a type each, of those that attend to all."""
    given = source.config.rope_parameters
    return dict(given.get("full_attention", given))


TARGETS: dict[str, Target] = {}
"""All formats, by name; the package fills it."""


def alternatives(source: Source, fits: Callable[[Target], bool] = lambda _: True) -> str:
    """Return which targets there are for a source."""
    fitting = [t.name for t in TARGETS.values() if t.refuses(source) is None and fits(t)]
    return f"choose --to {' or '.join(fitting)}" if fitting else "no other target can either"
