"""Optimizers: AdamW, Muon for the hidden matrices with AdamW for everything else, or plain SGD.

All read the parameter groups that the layers ask for, so a layer's learning-rate multiplier or its
wish not to be decayed holds whatever the optimizer. Tables with sparse gradients are updated by
SparseAdam, which leaves rows without a gradient, and their moments, as they are; or by SGD, which
has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, overload

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from moezoo import FeedForward, ParameterGroup, dtype_speed
from moezoo.errors import InputError, check_choice, check_number
from moezoo.experts import MLPExperts
from moezoo.matrices import Matrix
from moezoo_models.checkpoints.stock import stacked_experts
from moezoo_train.optim.muon import muon_step
from moezoo_train.optim.row_adam import RowAdam


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: ``adamw`` (arXiv:1711.05101), or ``muon`` (arXiv:2502.16982) for the matrices inside
            the blocks, those of stacked experts one by one, with AdamW for embeddings, heads,
            norms, routers and tables; or ``sgd``, without momentum.
        lr: peak learning rate of AdamW or SGD.
        weight_decay: times the learning rate; not on vectors and embeddings. Decoupled, which for
            SGD is the same as added to the gradient.
        betas: AdamW's averaging constants.
        eps: AdamW's floor under the square root.
        fused: one kernel for all of AdamW's arithmetic; the results differ in rounding only.
        muon_lr: peak learning rate of Muon.
        muon_momentum: Muon's Nesterov momentum.
        muon_scale: ``original`` scales an update by sqrt(max(1, rows/columns)); ``match_rms_adamw``
            gives it AdamW's size, so that muon_lr can equal lr.
        muon_dtype: arithmetic of Muon's orthogonalisation: ``bfloat16``, as its author's;
            ``float32``, in which the number of processes does not show in the result; or ``auto``:
            bfloat16 on accelerators, and on a CPU float32, unless its products in bf16 are
            measured to be so much faster that it pays (:mod:`moezoo.dtype_speed`). A resumed run
            keeps what it began with.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fused: bool = True
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_scale: Literal["original", "match_rms_adamw"] = "original"
    muon_dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, ["adamw", "muon", "sgd"])
        check_choice("optimizer.muon_scale", self.muon_scale, ["original", "match_rms_adamw"])
        check_choice("optimizer.muon_dtype", self.muon_dtype, ["auto", "bfloat16", "float32"])
        for field in ("lr", "weight_decay", "eps", "muon_lr"):
            check_number(f"optimizer.{field}", getattr(self, field))
        if len(self.betas) != 2:
            raise InputError(f"optimizer.betas: {self.betas} is no pair; write e.g. [0.9, 0.95]")
        beta1, beta2 = self.betas
        averages = {"betas[0]": beta1, "betas[1]": beta2, "muon_momentum": self.muon_momentum}
        for field, value in averages.items():
            if check_number(f"optimizer.{field}", value, maximum=1.0) == 1.0:
                raise InputError(f"optimizer.{field}: 1 never forgets; give a number below 1")

    def on(self, device: torch.device | str) -> OptimizerConfig:
        """Return the same configuration, with what ``auto`` stands for on a device."""
        if self.muon_dtype != "auto":
            return self
        # Without Muon it says nothing, and stays what it was before there was a choice: results
        # that were kept since then are still those of the same configuration.
        kind = torch.device(device).type
        chosen = dtype_speed.muon_dtype(kind) if self.name == "muon" else "bfloat16"
        return replace(self, muon_dtype=cast(Literal["bfloat16", "float32"], chosen))

    def as_begun(self, saved: Mapping[str, Any]) -> OptimizerConfig:
        """Return the same configuration, with what ``auto`` stood for when a run began.

        Args:
            saved: the optimizer as its checkpoint describes it.
        """
        if self.muon_dtype != "auto":
            return self
        return replace(self, muon_dtype=saved.get("muon_dtype", "bfloat16"))

    def here(self) -> OptimizerConfig:
        """Return what :meth:`on` does for the device that comparisons train on."""
        return self.on("cuda" if torch.cuda.is_available() else "cpu")


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Sort every trained parameter of a model into groups, each parameter exactly once.

    The layers' own groups come first, merged over layers that ask for the same; then the rest:
    linear maps with weight decay, vectors and embeddings without. A tied weight counts where it
    is first seen, as an embedding.
    """
    merged: dict[tuple[Any, ...], ParameterGroup] = {}
    claimed: set[nn.Parameter] = set()

    def claim(group: ParameterGroup) -> None:
        fresh = [p for p in group.parameters if p.requires_grad and p not in claimed]
        if not fresh:
            return
        claimed.update(fresh)
        wish = tuple(v for k, v in vars(group).items() if k != "parameters")
        if wish not in merged:
            merged[wish] = replace(group, parameters=[])
        merged[wish].parameters.extend(fresh)

    for module in model.modules():
        if isinstance(module, FeedForward):
            for group in module.parameter_groups():
                claim(group)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings = [p for p in model.parameters() if p in tables]
    claim(ParameterGroup("embeddings", embeddings, weight_decay=False))
    rest = list(model.parameters())
    claim(ParameterGroup("matrices", [p for p in rest if p.ndim >= 2]))
    claim(ParameterGroup("vectors", [p for p in rest if p.ndim < 2], weight_decay=False))
    return list(merged.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> Optimizer:
    """Build the optimizer over all trained parameters of a model.

    Args:
        model: a module whose FFN layers are :class:`moezoo.FeedForward`.
        config: which optimizer.
        fused: allow the fused kernel (fp16 gradient scaling cannot use it).

    Raises:
        InputError: the model has no trained parameter, or SparseAdam cannot do what is asked.
    """
    hidden = _hidden_matrices(model) if config.name == "muon" else set()
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(model):
        if config.name == "sgd":
            groups.append(_sgd_group(group, config))
            continue
        if group.sparse:
            groups.append(_sparse_group(group, config))
            continue
        plain = group.lr_multiplier == 1.0 and group.schedule and group.clip_group == "main"
        matrices = [p for p in group.parameters if plain and p in hidden]
        others = [p for p in group.parameters if not (plain and p in hidden)]
        if matrices:
            groups.append(_muon_group(group, matrices, config))
        if others:
            groups.append(_adamw_group(group, others, config, fused))
    if not groups:
        raise InputError("optimizer: the model has no trained parameter; unfreeze some")
    if config.name == "sgd":
        return SGD(groups)
    if config.name == "muon" or any(is_sparse(group) for group in groups):
        return CombinedOptimizer(groups)
    return AdamW([{k: v for k, v in group.items() if k != "algorithm"} for group in groups])


def is_sparse(group: dict[str, Any]) -> bool:
    """Return whether an optimizer's group is of parameters with sparse gradients."""
    return str(group.get("algorithm")).startswith("sparse")


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear maps and stacked experts, without the output head and without tables."""
    outside = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside.add(head.weight)
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    for module in model.modules():
        if isinstance(module, MLPExperts):
            linear |= {module.gate_up_proj, module.down_proj}
        elif isinstance(module, Matrix):
            linear |= {p for p in module.parameters(recurse=False) if p.ndim > 1}
    linear |= set(stacked_experts(model).values())
    return {p for p in model.parameters() if p in linear and p not in outside}


def _common(group: ParameterGroup, parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    return {
        "params": parameters,
        "name": group.name,
        "lr": lr * group.lr_multiplier,
        "schedule": group.schedule,
        "clip_group": group.clip_group,
    }


def _adamw_group(
    group: ParameterGroup, parameters: list[nn.Parameter], config: OptimizerConfig, fused: bool
) -> dict[str, Any]:
    return _common(group, parameters, config.lr) | {
        "algorithm": "adamw",
        "weight_decay": config.weight_decay if group.weight_decay else 0.0,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "fused": config.fused and fused,
    }


def _sgd_group(group: ParameterGroup, config: OptimizerConfig) -> dict[str, Any]:
    _check_decay(group, config)
    return _common(group, group.parameters, config.lr) | {
        "algorithm": "sparse_sgd" if group.sparse else "sgd",
        "weight_decay": config.weight_decay if group.weight_decay else 0.0,
    }


def _check_decay(group: ParameterGroup, config: OptimizerConfig) -> None:
    if group.sparse and group.weight_decay and config.weight_decay:
        raise InputError(
            f"optimizer.weight_decay: it would move every row of the group '{group.name}', whose "
            "gradients are sparse; set it to 0, or the layer's sparse to false"
        )


def _sparse_group(group: ParameterGroup, config: OptimizerConfig) -> dict[str, Any]:
    _check_decay(group, config)
    built = _common(group, group.parameters, config.lr)
    for field, value in (("lr", built["lr"]), ("eps", config.eps)):
        if not value > 0:
            raise InputError(
                f"optimizer.{field}: SparseAdam wants more than 0 for the group '{group.name}'; "
                "raise it, or set the layer's sparse to false"
            )
    return built | {
        "algorithm": "sparse_adam",
        "betas": tuple(config.betas),
        "eps": config.eps,
    }


def _muon_group(
    group: ParameterGroup, parameters: list[nn.Parameter], config: OptimizerConfig
) -> dict[str, Any]:
    return _common(group, parameters, config.muon_lr) | {
        "name": f"{group.name}, muon",
        "algorithm": "muon",
        "weight_decay": config.weight_decay if group.weight_decay else 0.0,
        "momentum": config.muon_momentum,
        "adjust_lr_fn": config.muon_scale,
        "dtype": config.on(parameters[0].device).muon_dtype,
    }


class CombinedOptimizer(Optimizer):
    """Muon, torch's AdamW, and SparseAdam by rows, as one optimizer.

    Learning-rate schedules, checkpoints and Lightning see a single ordinary optimizer.
    Three-dimensional parameters, which :class:`torch.optim.Muon` refuses, are stacks of matrices:
    each is orthogonalised by itself.

    Args:
        groups: parameter groups, each with ``algorithm``: ``"muon"``, ``"adamw"`` or
            ``"sparse_adam"``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Create AdamW and SparseAdam for their groups, on this optimizer's groups and state."""
        self._parts: list[Optimizer] = []
        for algorithm, part in (("adamw", AdamW), ("sparse_adam", RowAdam)):
            own = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if own:
                # It keeps these very dictionaries and fills in its defaults.
                self._parts.append(part(own))
                self._parts[-1].state = self.state

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        muon_step(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["momentum_buffer"] for p in parameters],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            adjust_lr_fn=group["adjust_lr_fn"],
            dtype=getattr(torch, group["dtype"]),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
        for part in self._parts:
            part.step()
        return loss
