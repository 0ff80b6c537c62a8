"""Reading a block of transformers: the options of the layer that computes what it computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moezoo.errors import InputError
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions, RouterOptions
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.holding import Held, Shared, build_layer
from moezoo_models.adopt.layouts import LAYOUTS, activation_of
from moezoo_models.adopt.table import ATTENTION, BY_CLASS, REASONS, Block, path_of

OTHERWISE = 'load the model with experts_implementation="moezoo", which holds every one'
_JITTER = ("jitter_noise", "router_jitter_noise", "input_jitter_noise")


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module is a mixture block of transformers, known or not."""
    path = path_of(module)
    if path in ATTENTION:
        return False
    if path in BY_CLASS or path in REASONS:
        return True
    return path.startswith("transformers") and isinstance(
        getattr(module, "experts", None), nn.Module
    )


def mixtures_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's mixture blocks by name.

    Raises:
        InputError: it has none.
    """
    blocks = {name or "it": module for name, module in model.named_modules() if is_mixture(module)}
    if not blocks:
        raise InputError(
            f"model: {type(model).__name__} has no mixture block of transformers; give a model "
            "with experts, or swap() its feed-forward blocks"
        )
    return blocks


def entry_of(block: nn.Module, name: str) -> Block:
    """Return the table's entry for a block.

    Raises:
        InputError: it is of no class that a SparseMoE holds, or its parts are not of theirs.
    """
    path = path_of(block)
    if (entry := BY_CLASS.get(path)) is None:
        reason = REASONS.get(path, "is of a class that moezoo does not know")
        raise InputError(f"model: {name} ({type(block).__name__}) {reason}; {OTHERWISE}")
    for at, expected in ((entry.router_at, entry.router), ("experts", entry.experts)):
        found = type(getattr(block, at)).__name__
        if found != expected:
            raise InputError(
                f"model: {name}.{at} is a {found} where {type(block).__name__} has a {expected}; "
                "adopt the model before its parts are replaced"
            )
    if "forward" in vars(block):
        raise InputError(f"model: the forward pass of {name} was replaced already; undo that first")
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if isinstance(tensor, DTensor):
            raise InputError(f"model: {name}.{key} is sharded; adopt first, and shard then")
        if not tensor.is_floating_point():
            raise InputError(
                f"model: {name}.{key} is {tensor.dtype}, as if quantized; load it unquantized, or "
                + OTHERWISE
            )
    return entry


def hold(block: nn.Module, entry: Block, name: str, balance: BalanceOptions | None = None) -> Held:
    """Return the layer that computes what a block computes, bound to the block's parameters.

    Raises:
        InputError: it does something that the layer's options cannot say.
    """
    router, experts = getattr(block, entry.router_at), block.experts
    refuse = _Refuse(name, block)
    for module in (block, router):
        for attribute in _JITTER:
            if getattr(module, attribute, 0.0):
                refuse(f"jitters what its experts read as well ({attribute}); set it to 0")
    convention, layout = CONVENTIONS[entry.convention], LAYOUTS[entry.layout]
    weight = block.get_parameter(entry.weight)
    tensors = {
        f"experts.{ours}": Shared(f"experts.{ours}", stored.path, stored.view, stored.hidden)
        for ours, stored in layout.tensors.items()
    }
    down = _shape(block, tensors["experts.down_proj"])
    if (activation := activation_of(experts)) is None:
        refuse(f"activates by {getattr(experts, 'act_fn', None)}")
    num_experts, d_model = weight.shape
    arguments: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": int(router.top_k),
        "d_expert": down[2],
        "activation": activation,
        "gated": layout.gated,
        "router": RouterOptions(**convention.read(router, block)),
        "balance": balance or BalanceOptions(load_balancing=0.0),
        **layout.arguments(experts),
    }
    found = [*tensors.values(), Shared("gate.weight", entry.weight, _same, None)]
    if entry.bias is not None:
        found.append(Shared("gate.selection_bias", entry.bias, _same, None))
    arguments |= _shared_expert(block, entry, arguments["d_expert"], layout.gated, found, refuse)
    layer = _build(d_model, arguments, refuse)
    _check_all_are_shared(block, entry, layer, found, refuse)
    return Held(block, entry, layer, found, _factor(block))


class _Refuse:
    def __init__(self, name: str, block: nn.Module) -> None:
        self.start = f"model: {name} ({type(block).__name__})"

    def __call__(self, reason: str) -> Any:
        raise InputError(f"{self.start} {reason}; or {OTHERWISE}")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _shape(block: nn.Module, shared: Shared) -> tuple[int, ...]:
    return tuple(shared.view(block.get_parameter(shared.theirs)).shape)


def _shared_expert(
    block: nn.Module,
    entry: Block,
    d_expert: int,
    gated: bool,
    found: list[Shared],
    refuse: _Refuse,
) -> dict[str, Any]:
    """Return the arguments that a shared expert adds, and add its tensors to those found."""
    shared = getattr(block, entry.shared, None) if entry.shared else None
    if shared is None:
        return {}
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    for name in names:
        linear: Any = getattr(shared, name, None)
        if type(linear) is not nn.Linear:
            refuse(f"has a shared expert of another form ({type(shared).__name__})")
        if linear.bias is not None:
            refuse("has biases in its shared expert and none in the others")
        axis = 1 if name == "down_proj" else 0
        path = f"{entry.shared}.{name}.weight"
        found.append(Shared(f"shared_expert.{name}.weight", path, _same, axis))
    if entry.shared_gate is not None:
        path = f"{entry.shared_gate}.weight"
        found.append(Shared("shared_expert_gate.weight", path, _same, None))
    width = shared.down_proj.in_features
    number = width // d_expert if width % d_expert == 0 else 1
    arguments: dict[str, Any] = {"num_shared_experts": number, "d_shared": width}
    if entry.shared_gate is not None:
        arguments["shared_gate"] = True
    return arguments


def _build(d_model: int, arguments: dict[str, Any], refuse: _Refuse) -> SparseMoE:
    try:
        return build_layer(d_model, arguments)
    except InputError as error:
        return refuse(f"has options that a SparseMoE refuses ({error})")


def _factor(block: Any) -> float:
    """Return what a block multiplies the sum of all with."""
    averaged = getattr(block, "shared_expert_combination_strategy", "sum") == "average"
    return 0.5 if averaged and block.num_shared_experts else 1.0


def _check_all_are_shared(
    block: nn.Module, entry: Block, layer: SparseMoE, found: list[Shared], refuse: _Refuse
) -> None:
    """Refuse a block with a parameter that the layer does not have, or the other way round."""
    theirs = {tensor.theirs for tensor in found}
    for key, _ in [*block.named_parameters(), *block.named_buffers()]:
        if key not in theirs and key.partition(".")[0] != entry.after:
            refuse(f"has {key}, which has no place in a SparseMoE")
    missing = layer.state_dict().keys() - {tensor.ours for tensor in found}
    if missing:
        refuse(f"has no {sorted(missing)[0]}")
