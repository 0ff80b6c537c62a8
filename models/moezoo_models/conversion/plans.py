"""Plans that have to be found by calibration, kept in files until they are carried out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moezoo.convert import LayerPlan
from moezoo.convert.plan import Expert
from moezoo_models.checkpoints.atomic import atomic_write

_LARGEST_LOGIT = 0.01
"""With which unit weights are written as sigmoids."""
_CHUNK = 8192
"""Tokens whose logits are computed at once."""
_OPTIONAL = ("router_bias", "router_neurons", "router_up", "down", "bias")


@dataclasses.dataclass(frozen=True)
class Plans:
    """One plan per layer, each in a file of its own.

    Attributes:
        directory: where they are.
    """

    directory: Path

    def save(self, layer: int, plan: LayerPlan, figures: dict[str, float]) -> None:
        """Keep a plan without redrawn neurons, and what was measured of it; atomically."""
        scalars = {
            "top_k": plan.top_k,
            "weighting": plan.weighting,
            "flatness": plan.flatness,
            "signed": plan.signed,
            "reads_shared": plan.reads_shared,
            "out_scale": plan.experts[0].out_scale,
            "figures": figures,
        }
        tensors = {
            "experts": torch.stack([expert.neurons for expert in plan.experts]),
            "shared": None if plan.shared is None else plan.shared.neurons,
            "router": plan.router,
            **{name: getattr(plan, name) for name in _OPTIONAL},
        }
        kept = {name: t.cpu().contiguous() for name, t in tensors.items() if t is not None}
        with atomic_write(self._file(layer)) as file:
            file.write(save(kept, {"plan": json.dumps(scalars)}))

    def __contains__(self, layer: int) -> bool:
        return self._file(layer).is_file()

    def read(self, layer: int, device: torch.device | str = "cpu") -> LayerPlan:
        """Read a layer's plan."""
        with safe_open(self._file(layer), framework="pt", device=str(device)) as file:
            names = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
            scalars = _scalars(file)
        shared = tensors.get("shared")
        return LayerPlan(
            experts=tuple(Expert(e, out_scale=scalars["out_scale"]) for e in tensors["experts"]),
            top_k=scalars["top_k"],
            router=tensors["router"],
            weighting=scalars["weighting"],
            shared=None if shared is None else Expert(shared),
            flatness=scalars["flatness"],
            signed=scalars["signed"],
            reads_shared=scalars["reads_shared"],
            **{name: tensors.get(name) for name in _OPTIONAL},
        )

    def figures(self, layer: int) -> dict[str, float]:
        """Read what was measured of a layer's plan."""
        with safe_open(self._file(layer), framework="pt") as file:
            return _scalars(file)["figures"]

    def _file(self, layer: int) -> Path:
        return self.directory / f"plan-{layer:05d}.safetensors"


def _scalars(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["plan"])


def writable(plan: LayerPlan, x: Tensor, dtype: torch.dtype, flat: bool) -> LayerPlan:
    """Make of a plan with unit weights what a checkpoint of this dtype holds exactly.

    All tensors are rounded as they will be in the file. Where all experts are active there is
    nothing to route.

    Args:
        plan: the plan.
        x: ``(T, D)``, inputs on which logits are measured.
        dtype: of the checkpoint.
        flat: the format has no unit weights, but sigmoids of a linear router's logits, normalized.
            A common offset of all logits says nothing and would make those less alike: it is taken
            away. ``flatness`` becomes the power of two with which the largest logit is at most
            0.01, so that no weight is off by more than 0.5 %.
    """
    router, bias = plan.router.to(x), plan.router_bias
    if plan.top_k == plan.num_experts:
        router, bias = torch.zeros_like(router), None
    flatness = 1.0
    if flat:
        router = router - router.mean(dim=0)
        bias = None if bias is None else bias - bias.mean()
        largest = max(float((part @ router.t()).abs().max()) for part in x.split(_CHUNK))
        flatness = _power_of_two(_LARGEST_LOGIT / largest) if largest else plan.flatness
    elif bias is not None:
        bias = bias.to(dtype).float()
    return dataclasses.replace(
        plan,
        router=(router * flatness).to(dtype).float() / flatness,
        router_bias=bias,
        router_up=_rounded(plan.router_up, dtype),
        down=None if plan.down is None else plan.down.to(dtype),
        bias=_rounded(plan.bias, dtype),
        flatness=flatness,
    )


def _rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).float()


def _power_of_two(value: float) -> float:
    """Return the largest power of two that is not larger."""
    return 2.0 ** math.floor(math.log2(value))
