"""Reading a block of transformers: the options of the layer that computes what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moezoo.errors import InputError
from moezoo.experts import ExpertNormOptions
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions, RouterOptions
from moezoo_kernels.activations import PLAIN_GLU, GLUOptions
from moezoo_models.adapters.torch import has_forward_hooks
from moezoo_models.adopt.block import Block, path_of
from moezoo_models.adopt.by_table import HeldByTable, TableMoE
from moezoo_models.adopt.carrying import HeldCarrying
from moezoo_models.adopt.conventions import CONVENTIONS
from moezoo_models.adopt.holding import Held, Shared, build_layer, bypassed
from moezoo_models.adopt.in_layer import HeldInLayer, RouterAndExperts
from moezoo_models.adopt.layouts import LAYOUTS, SHARED, Layout, flat, rows
from moezoo_models.adopt.reasons import ATTENTION, REASONS
from moezoo_models.adopt.table import BY_CLASS
from moezoo_models.adopt.units import UNITS, CannotSay

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def otherwise(block: nn.Module) -> str:
    """Return what to do about a block that is not held, to end a message with."""
    text = "; leave it out with where="
    # An attribute that transformers gives to experts whose computation is chosen by name.
    if any(hasattr(part, "is_concatenated") for part in block.modules()):
        text += ', or load the model with experts_implementation="moezoo", which keeps its router'
    return text


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module is a mixture block of transformers, known or not."""
    path = path_of(module)
    if path in ATTENTION:
        return False
    holds = isinstance(getattr(module, "experts", None), nn.Module)
    if path in BY_CLASS or path in REASONS:
        return holds or not path.endswith("Layer")  # a layer that may be dense
    return holds and path.startswith("transformers")


def as_block(module: nn.Module) -> nn.Module:
    """Return a mixture block, or for a layer that runs router and experts itself, these as one."""
    entry = BY_CLASS.get(path_of(module))
    return RouterAndExperts(module) if entry is not None and entry.in_layer else module


def mixtures_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's mixture blocks by name.

    Raises:
        InputError: it has none.
    """
    blocks = {
        name or "it": as_block(module)
        for name, module in model.named_modules()
        if is_mixture(module)
    }
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
    path, title = _class_of(block)
    if (entry := BY_CLASS.get(path)) is None:
        reason = REASONS.get(path, "is of a class that moezoo does not know")
        raise InputError(f"model: {name} ({title}) {reason}{otherwise(block)}")
    if type(getattr(block, entry.router_at)).__name__ == entry.table_router:
        entry = replace(entry, router=entry.table_router, bias=None)
    else:
        entry = replace(entry, table=None)
    for at, expected in ((entry.router_at, entry.router), (entry.experts_at, entry.experts)):
        found = type(getattr(block, at)).__name__
        if found != expected:
            raise InputError(
                f"model: {name}.{at} is a {found} where {title} has a {expected}; "
                "adopt the model before its parts are replaced"
            )
    parts = [getattr(block, entry.router_at), block.experts] if entry.in_layer else [block]
    if any("forward" in vars(part) for part in parts):
        raise InputError(f"model: the forward pass of {name} was replaced already; undo that first")
    for path, part in bypassed(block, entry):
        if "forward" in vars(part) or has_forward_hooks(part):
            raise InputError(
                f"model: {name}.{path} has hooks or a forward pass of its own, which an adopted "
                f"block does not run; remove them{otherwise(block)}"
            )
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if isinstance(tensor, DTensor):
            raise InputError(f"model: {name}.{key} is sharded; adopt first, and shard then")
        if tensor.dtype not in _DTYPES and key != entry.table:
            raise InputError(
                f"model: {name}.{key} is {tensor.dtype}, as if quantized; dequantize the model, or "
                "leave the block out with where="
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
    try:
        unit = experts if entry.unit_at is None else block.get_submodule(entry.unit_at)
        activation, glu = UNITS[entry.unit].read(unit, block)
        shared_glu = _shared_unit(block, entry, activation)
    except CannotSay as reason:
        refuse(str(reason))
    num_experts, d_expert, found = _experts(block, experts, layout)
    options = convention.read(router, block)
    capacity = options.pop("capacity", None)
    slots, d_model = _routed(block, entry, options, num_experts, found)
    arguments: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": _top_k(router, block),
        "d_expert": d_expert,
        "activation": activation,
        "gated": layout.gated,
        "bias": "down_bias" in layout.tensors,
        "interleaved": layout.interleaved,
        "glu": glu,
        "num_skip_experts" if entry.skips else "num_identity_experts": slots - num_experts,
        "capacity": capacity,
        "balance": balance or BalanceOptions(load_balancing=0.0),
    }
    arguments |= _latent(block, entry, found) | _norms(block, entry, found)
    arguments |= _shared_expert(block, entry, d_expert, found, refuse)
    if "d_shared" in arguments and shared_glu != glu:
        arguments["shared_glu"] = shared_glu
    kind: type[SparseMoE] = SparseMoE
    if entry.table is not None:
        found.append(Shared("gate.table", entry.table))
        kind, arguments = TableMoE, arguments | {"rows": len(block.get_buffer(entry.table))}
    try:
        layer = build_layer(d_model, arguments | {"router": RouterOptions(**options)}, kind)
    except InputError as error:
        return cast("Held", refuse(f"has options that a SparseMoE refuses ({error})"))
    _check_all_are_shared(block, entry, layer, found, refuse)
    if entry.in_layer:
        return HeldInLayer(block, entry, layer, found)
    by = HeldCarrying if entry.carries else Held if entry.table is None else HeldByTable
    held = by(block, entry, layer, found, _factor(block))
    held.refuse_dropout()
    return held


def _class_of(block: nn.Module) -> tuple[str, str]:
    """Return the path and the name of the class that a block is of, or that has it as parts."""
    path = block.stands_for if isinstance(block, RouterAndExperts) else path_of(block)
    return path, path.rpartition(".")[2]


class _Refuse:
    def __init__(self, name: str, block: nn.Module) -> None:
        self.start, self.block = f"model: {name} ({_class_of(block)[1]})", block

    def __call__(self, reason: str) -> Any:
        raise InputError(f"{self.start} {reason}{otherwise(self.block)}")


def _shared_unit(block: nn.Module, entry: Block, activation: str) -> GLUOptions:
    """Return the bounds of the shared expert's units; those are plain if there is none."""
    shared = getattr(block, entry.shared, None) if entry.shared else None
    if shared is None:
        return PLAIN_GLU
    found, glu = UNITS[entry.shared_unit or entry.unit].read(shared, block)
    if found != activation:
        raise CannotSay(f"activates by {activation}, and its shared expert by {found}")
    return glu


def _experts(block: nn.Module, experts: Any, layout: Layout) -> tuple[int, int, list[Shared]]:
    """Return how many experts there are, of how many hidden neurons, and their tensors."""
    down = layout.tensors["down_proj"]
    plain = down.is_plain
    number = block.get_parameter(down.path).shape[0] if plain else int(experts.num_experts)
    views = {
        ours: stored.view if stored.by_number is None else stored.by_number(number)
        for ours, stored in layout.tensors.items()
    }
    parts = (block.get_parameter(path) for path in down.paths(number))
    shapes = [torch.empty_like(part, device="meta") for part in parts]
    d_expert = views["down_proj"](*shapes).shape[2]
    found = []
    for ours, stored in layout.tensors.items():
        first, *others = stored.paths(number)
        more = plain and block.get_parameter(first).shape[0] > number
        view = rows(None, number) if more else views[ours]
        where = (f"experts.{ours}", first, view, stored.hidden, d_expert, tuple(others))
        found.append(Shared(*where))
    return number, d_expert, found


def _top_k(router: Any, block: Any) -> int:
    for owner in (router, block):
        if hasattr(owner, "top_k"):
            return int(owner.top_k)
    return int(router.config.top_k_experts) if hasattr(router, "config") else 1


def _latent(block: Any, entry: Block, found: list[Shared]) -> dict[str, Any]:
    """Return the width between an experts' shared maps, and add these to the tensors found."""
    if entry.latent is None or not isinstance(getattr(block, entry.latent[0]), nn.Linear):
        return {}
    down, up = entry.latent
    found += [Shared("latent_down.weight", f"{down}.weight")]
    found += [Shared("latent_up.weight", f"{up}.weight")]
    return {"d_latent": getattr(block, down).out_features}


def _norms(block: nn.Module, entry: Block, found: list[Shared]) -> dict[str, Any]:
    """Return the norms around experts, and add their scales to the tensors found."""
    if entry.norms is None:
        return {}
    before, after = entry.norms
    found += [Shared("input_norm.weight", f"{before}.weight")]
    found += [Shared("output_norm.weight", f"{after}.weight")]
    eps: list[Any] = [block.get_submodule(name).eps for name in entry.norms]
    return {"expert_norms": ExpertNormOptions(True, True, float(eps[0]), float(eps[1]))}


def _routed(
    block: nn.Module, entry: Block, options: dict[str, Any], num_experts: int, found: list[Shared]
) -> tuple[int, int]:
    """Add the router's tensors to those found; return how many it chooses from, and its width."""
    slots = block.get_parameter(entry.weight).shape[0]
    d_model = block.get_parameter(entry.reads or entry.weight).shape[1]
    weight, weights = "gate.weight", options.get("weights")
    if weights is not None and weights.with_shared:
        found.append(Shared(weight, entry.weight, rows(None, num_experts)))
        found.append(Shared("gate.shared_weight", entry.weight, rows(num_experts, None)))
        slots = num_experts
    else:
        found.append(Shared(weight, entry.weight))
    if options.get("selection_bias"):
        assert entry.bias is not None
        found.append(Shared("gate.selection_bias", entry.bias, flat))
    there = dict(block.named_parameters())
    found += [Shared(f"gate.{ours}", theirs) for ours, theirs in entry.more if theirs in there]
    return slots, d_model


def _shared_expert(
    block: nn.Module, entry: Block, d_expert: int, found: list[Shared], refuse: _Refuse
) -> dict[str, Any]:
    """Return the arguments that a shared expert adds, and add its tensors to those found."""
    shared = getattr(block, entry.shared, None) if entry.shared else None
    if shared is None:
        return {}
    form = SHARED[entry.shared_form]
    parameters = dict(shared.named_parameters())
    biases = [path.replace("weight", "bias") for path in form]
    biased = [bias for bias in biases if bias in parameters]
    if missing := {stored.path for stored in form.values()} - parameters.keys():
        refuse(f"has a shared expert without {sorted(missing)[0]} ({type(shared).__name__})")
    down = form["down_proj.weight"]
    width = down.view(parameters[down.path]).shape[1]
    if not width:
        return {}
    unit = parameters[down.path].shape[down.hidden or 0]
    for ours, stored in form.items():
        path = f"{entry.shared}.{stored.path}"
        found.append(Shared(f"shared_expert.{ours}", path, stored.view, stored.hidden, unit))
    for bias in biased:
        axis = None if bias.startswith("down") else 0
        found.append(
            Shared(f"shared_expert.{bias}", f"{entry.shared}.{bias}", hidden=axis, unit=unit)
        )
    number = width // d_expert if width % d_expert == 0 else 1
    arguments: dict[str, Any] = {"num_shared_experts": number, "d_shared": width}
    if bool(biased) != ("down_bias" in LAYOUTS[entry.layout].tensors):
        arguments["shared_bias"] = bool(biased)
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
    theirs = {name for tensor in found for name in tensor.all_theirs} | {entry.added, *entry.unread}
    if entry.shared_gate is not None and not layer.d_shared:  # it weighs nothing
        theirs.add(f"{entry.shared_gate}.weight")
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if not tensor.numel():
            continue  # of a shared expert without neurons
        if key not in theirs and key.partition(".")[0] != entry.after:
            refuse(f"has {key}, which has no place in a SparseMoE")
    missing = layer.state_dict().keys() - {tensor.ours for tensor in found}
    if missing:
        refuse(f"has nothing for {sorted(missing)[0]} of a SparseMoE")
