"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by PEFT: little is trained, little is kept.

PEFT replaces linear maps by wrapped ones in place, so a model stays of its class. Stacked experts
are adapted as parameters: expert e of ``(experts, out, in)`` gets its own ``B_e A_e``. A run's
checkpoints hold what is trained and name the rest by a hash; its ``model/`` holds everything
merged, under the names it has without adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moezoo import CarvedMoE
from moezoo.errors import InputError, check_int, check_number, nearest
from moezoo.experts import MLPExperts
from moezoo.parallel import whole
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.stock import stacked_experts
from moezoo_train.optim.optimizer import OptimizerConfig

ADAPTER = "default"
"""PEFT's name for the only adapter."""


@dataclass(frozen=True)
class LoRAOptions:
    """Options of low-rank adapters.

    Attributes:
        rank: of each adapter, r.
        alpha: an adapter's output is multiplied by alpha / rank.
        dropout: of what goes into the adapters of linear maps; not with stacked experts.
        target_modules: last parts of the names of linear maps to adapt; default: those of
            attention.
        target_parameters: last parts of the names of stacked parameters to adapt; default: the
            routed experts' projections. An empty list leaves them as they are.
        train_also: last parts of the names of parameters to train fully; default: CMoE's scale u.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    train_also: list[str] | None = None

    def __post_init__(self) -> None:
        check_int("lora.rank", self.rank)
        check_number("lora.alpha", self.alpha)
        check_number("lora.dropout", self.dropout, maximum=0.99)


def check_lora(
    options: LoRAOptions | None, base: str | None, optimizer: OptimizerConfig, compiled: bool
) -> None:
    """Refuse options that do not go with adapters.

    Raises:
        InputError: names the option to change.
    """
    if options is None:
        return
    if base is None:
        raise InputError("lora: adapters need a trained model; set initialize_from")
    if optimizer.name == "muon":
        raise InputError(
            "optimizer.name: muon is for whole matrices, not for their low-rank factors; use adamw"
        )
    if compiled:
        raise InputError(
            "compile: PEFT's adapters of stacked experts cannot be compiled; set it to false"
        )


def add_adapters(model: PreTrainedModel, options: LoRAOptions, base: str) -> None:
    """Freeze a model and put adapters on it, in place; those begin as zero.

    Args:
        model: ours or a stock one.
        options: which modules and parameters to adapt.
        base: the directory it came from, for the adapters' configuration.

    Raises:
        InputError: PEFT is missing, or the model lacks what is to be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("lora: adapters need PEFT; run: pip install 'moezoo[lora]'") from error
    modules, parameters = _modules(model, options), _parameters(model, options)
    if options.dropout and parameters:
        raise InputError(
            "lora.dropout: adapters of stacked experts have none; set it to 0, or "
            "lora.target_parameters to []"
        )
    also = _also(model, options)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    config.base_model_name_or_path = str(base)
    model.adapted_weights = weights_hash(model)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # It is: what is written says that they are not tied any more.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise InputError(f"lora: {' '.join(str(error).split())}") from error
    for _, wrapper in _wrappers(model):
        if isinstance(wrapper.get_base_layer(), MLPExperts):
            _see_through(wrapper)
    for parameter in also:
        parameter.requires_grad_(True)


def describe_adapters(model: PreTrainedModel, options: LoRAOptions | None) -> dict[str, Any]:
    """Describe adapters, and the weights they are for; nothing without."""
    if options is None:
        return {}
    return asdict(options) | {"base": model.adapted_weights}


def trained_state(
    module: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the part of a state dictionary that training changes: trained parameters, buffers.

    Args:
        module: whose parameters.
        state_dict: its whole tensors, if processes keep parts.
    """
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    names |= {name for name, _ in module.named_buffers()}
    state = module.state_dict() if state_dict is None else state_dict
    return {name: tensor for name, tensor in state.items() if name in names}


def merged_state(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """Return the state dictionary of the same function without adapters; the model keeps its own.

    Args:
        model: with adapters; all processes that keep parts of it must call this together.
        state_dict: its whole tensors, if processes keep parts.
        keep: whether this process wants the result; else it only gives its parts.
    """
    state = model.state_dict() if state_dict is None else state_dict
    merged = {_plain(name): tensor for name, tensor in state.items() if not of_adapter(name)}
    for name, module in _wrappers(model):
        weight = f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"
        with torch.no_grad(), _whole_factors(module):
            if keep:
                delta = module.get_delta_weight(ADAPTER)
                merged[weight] = merged[weight] + delta.to(merged[weight].device)
    return merged if keep else {}


@contextmanager
def _whole_factors(wrapper: Any) -> Iterator[None]:
    """All-gather an adapter's sharded factors."""
    maps = [*wrapper.lora_A.values(), *wrapper.lora_B.values()]
    own = [linear.weight for linear in maps]
    try:
        for linear, weight in zip(maps, own, strict=True):
            linear.weight = nn.Parameter(whole(weight), requires_grad=False)
        yield
    finally:
        for linear, weight in zip(maps, own, strict=True):
            linear.weight = weight


def save_adapters(
    directory: Path, model: Any, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapters as PEFT reads them, and beside them what else is trained.

    Args:
        directory: to make or replace, with ``adapter_config.json``, ``adapter_model.safetensors``,
            and ``trained.safetensors`` if there is anything else.
        model: with adapters.
        state_dict: its whole tensors, if processes keep parts.
    """
    state = trained_state(model, state_dict)
    trained = {name: tensor.detach().cpu() for name, tensor in state.items()}
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in trained.items()
        if of_adapter(name)
    }
    rest = {_plain(n): t.clone() for n, t in trained.items() if not of_adapter(n)}
    with replacing_directory(directory) as fresh:
        model.peft_config[ADAPTER].save_pretrained(fresh)
        save_file(adapters, fresh / "adapter_model.safetensors", {"format": "pt"})
        if rest:
            save_file(rest, fresh / "trained.safetensors", {"format": "pt"})


def weights_hash(model: nn.Module) -> str:
    """Hash all parameters, so that adapters are not put on another model by mistake."""
    found = {
        name: torch.hash_tensor(parameter.detach()).view(torch.int64).item()
        for name, parameter in model.named_parameters()
        if parameter.numel()
    }
    return blake2b(str(sorted(found.items())).encode(), digest_size=16).hexdigest()


def _see_through(wrapper: nn.Module) -> None:
    """Forward what PEFT's wrapper lacks to the wrapped experts: costs, dispatch, widths."""

    def ask(self: nn.Module, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base_layer"), name)

    def infer(self: nn.Module, *args: Any) -> Any:
        return self(*args)  # the base layer's own would leave the adapters out

    kind = type(wrapper)
    wrapper.__class__ = type(kind.__name__, (kind,), {"__getattr__": ask, "infer": infer})


def _modules(model: nn.Module, options: LoRAOptions) -> list[str]:
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if options.target_modules is not None:
        _check_there("target_modules", options.target_modules, linear)
        return options.target_modules
    return sorted({name.rpartition(".")[2] for name in linear if ".self_attn." in name})


def _parameters(model: nn.Module, options: LoRAOptions) -> list[str]:
    stacks = list(stacked_experts(model))
    for name, module in model.named_modules():
        if isinstance(module, MLPExperts):
            own = [part for part, p in module.named_parameters() if p.ndim == 3]
            stacks += [f"{name}.{part}" for part in own]
    if options.target_parameters is not None:
        _check_there("target_parameters", options.target_parameters, stacks)
        return options.target_parameters
    return sorted({".".join(name.split(".")[-2:]) for name in stacks})


def _also(model: nn.Module, options: LoRAOptions) -> list[nn.Parameter]:
    if options.train_also is None:
        return [m.u for m in model.modules() if isinstance(m, CarvedMoE)]
    named = dict(model.named_parameters())
    _check_there("train_also", options.train_also, list(named))
    return [p for name, p in named.items() if _ends_in(name, options.train_also)]


def _check_there(field: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    for each in wanted:
        if not any(_ends_in(name, [each]) for name in names):
            known = {name.rpartition(".")[2] for name in names} or {"none"}
            raise InputError(f"lora.{field}: the model has no '{each}'{nearest(each, known)}")


def _ends_in(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Go through PEFT's wrappers, each of which adapts one tensor."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def of_adapter(name: str) -> bool:
    """Return whether a tensor of a state dictionary, or the module of a name, is an adapter's."""
    return ".lora_" in name


def _plain(name: str) -> str:
    """Return the name that a tensor or module has without PEFT's wrappers."""
    return name.replace(".base_layer", "")
