"""Reading a block of transformers: the options of the layer that computes what it computes."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from moezoo.errors import InputError
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions, RouterOptions
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.holding import Held, Shared, build_layer
from moezoo_models.adopt.layouts import LAYOUTS, SHARED, activation_of, flat, rows
from moezoo_models.adopt.table import ATTENTION, BY_CLASS, REASONS, Block, path_of

OTHERWISE = 'load the model with experts_implementation="moezoo", which holds every one'


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
    for at, expected in ((entry.router_at, entry.router), (entry.experts_at, entry.experts)):
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
    router, experts = getattr(block, entry.router_at), getattr(block, entry.experts_at)
    refuse = _Refuse(name, block)
    for attribute in ("input_jitter_noise",):
        if getattr(block, attribute, 0.0):
            refuse(f"jitters twice what its router reads ({attribute}); set it to 0")
    convention, layout = CONVENTIONS[entry.convention], LAYOUTS[entry.layout]
    if (activation := activation_of(experts, block)) is None:
        refuse(f"activates by {getattr(experts, 'act_fn', None)}")
    down = layout.tensors["down_proj"]
    d_expert = down.view(block.get_parameter(down.path)).shape[2]
    found = [
        Shared(f"experts.{ours}", stored.path, stored.view, stored.hidden, d_expert)
        for ours, stored in layout.tensors.items()
    ]
    options = convention.read(router, block)
    num_experts, d_model = _routed(block, entry, options, found)
    arguments: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": int(router.top_k),
        "d_expert": d_expert,
        "activation": activation,
        "gated": layout.gated,
        "balance": balance or BalanceOptions(load_balancing=0.0),
        **layout.arguments(experts),
    }
    arguments |= _shared_expert(block, entry, d_expert, found, refuse)
    try:
        layer = build_layer(d_model, arguments | {"router": RouterOptions(**options)})
    except InputError as error:
        return cast("Held", refuse(f"has options that a SparseMoE refuses ({error})"))
    _check_all_are_shared(block, entry, layer, found, refuse)
    return Held(block, entry, layer, found, _factor(block))


class _Refuse:
    def __init__(self, name: str, block: nn.Module) -> None:
        self.start = f"model: {name} ({type(block).__name__})"

    def __call__(self, reason: str) -> Any:
        raise InputError(f"{self.start} {reason}; or {OTHERWISE}")


def _routed(
    block: nn.Module, entry: Block, options: dict[str, Any], found: list[Shared]
) -> tuple[int, int]:
    """Add the router's tensors to those found; return the numbers of experts and of features."""
    rows_E, d_model = block.get_parameter(entry.weight).shape
    weight, weights = "gate.weight", options.get("weights")
    if weights is not None and weights.with_shared:
        num_experts = block.get_parameter(LAYOUTS[entry.layout].tensors["down_proj"].path).shape[0]
        found.append(Shared(weight, entry.weight, rows(None, num_experts)))
        found.append(Shared("gate.shared_weight", entry.weight, rows(num_experts, None)))
    else:
        num_experts = rows_E
        found.append(Shared(weight, entry.weight))
    if options.get("selection_bias"):
        assert entry.bias is not None
        found.append(Shared("gate.selection_bias", entry.bias, flat))
    found += [Shared(f"gate.{ours}", theirs) for ours, theirs in entry.more]
    return num_experts, d_model


def _shared_expert(
    block: nn.Module, entry: Block, d_expert: int, found: list[Shared], refuse: _Refuse
) -> dict[str, Any]:
    """Return the arguments that a shared expert adds, and add its tensors to those found."""
    shared = getattr(block, entry.shared, None) if entry.shared else None
    if shared is None:
        return {}
    form = SHARED[entry.shared_form]
    parameters = dict(shared.named_parameters())
    if missing := {stored.path for stored in form.values()} - parameters.keys():
        refuse(f"has a shared expert without {sorted(missing)[0]} ({type(shared).__name__})")
    down = form["down_proj.weight"]
    width = down.view(parameters[down.path]).shape[1]
    unit = parameters[down.path].shape[down.hidden or 0]
    for ours, stored in form.items():
        path = f"{entry.shared}.{stored.path}"
        found.append(Shared(f"shared_expert.{ours}", path, stored.view, stored.hidden, unit))
    number = width // d_expert if width % d_expert == 0 else 1
    arguments: dict[str, Any] = {"num_shared_experts": number, "d_shared": width}
    if entry.shared_gate is not None:
        found.append(Shared("shared_expert_gate.weight", f"{entry.shared_gate}.weight"))
        arguments["shared_gate"] = True
    return arguments


def _factor(block: Any) -> float:
    """Return what a block multiplies the sum of all with."""
    averaged = getattr(block, "shared_expert_combination_strategy", "sum") == "average"
    return 0.5 if averaged and block.num_shared_experts else 1.0


def _check_all_are_shared(
    block: nn.Module, entry: Block, layer: SparseMoE, found: list[Shared], refuse: _Refuse
) -> None:
    """Refuse a block with a parameter that the layer does not have, or the other way round."""
    theirs = {tensor.theirs for tensor in found} | {entry.added}
    for key, _ in [*block.named_parameters(), *block.named_buffers()]:
        if key not in theirs and key.partition(".")[0] != entry.after:
            refuse(f"has {key}, which has no place in a SparseMoE")
    missing = layer.state_dict().keys() - {tensor.ours for tensor in found}
    if missing:
        refuse(f"has nothing for {sorted(missing)[0]} of a SparseMoE")
