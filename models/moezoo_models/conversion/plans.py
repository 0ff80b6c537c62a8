"""Plans that have to be found by calibration, kept in files until they are carried out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moezoo.convert import LayerPlan
from moezoo.convert.plan import Expert
from moezoo_models.atomic import atomic_write

_FLATNESS = 0.01
"""Largest logit, beside the mean of its token, that unit weights are written with."""


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
            "out_scale": plan.experts[0].out_scale,
            "figures": figures,
        }
        tensors = {
            "experts": torch.stack([expert.neurons for expert in plan.experts]),
            "shared": None if plan.shared is None else plan.shared.neurons,
            "router": plan.router,
            "router_bias": plan.router_bias,
            "down": plan.down,
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
            router_bias=tensors.get("router_bias"),
            weighting=scalars["weighting"],
            shared=None if shared is None else Expert(shared),
            down=tensors.get("down"),
            flatness=scalars["flatness"],
        )

    def figures(self, layer: int) -> dict[str, float]:
        """Read what was measured of a layer's plan."""
        with safe_open(self._file(layer), framework="pt") as file:
            return _scalars(file)["figures"]

    def _file(self, layer: int) -> Path:
        return self.directory / f"plan-{layer:05d}.safetensors"


def _scalars(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["plan"])


def writable(plan: LayerPlan, x: Tensor, dtype: torch.dtype) -> LayerPlan:
    """Make of a plan with unit weights what a checkpoint of this dtype can hold exactly.

    A common offset of all logits says nothing; it is taken away, as sigmoids would be less alike
    with it. ``flatness`` is the power of two with which the largest logit becomes at most 0.01, so
    that no unit weight is off by more than 0.5 %. Where all experts answer there is nothing to
    route. Router and refit are rounded as they will be in the file.

    Args:
        plan: with a linear router.
        x: ``(T, D)``, inputs on which logits are measured.
        dtype: of the checkpoint.
    """
    router = plan.router.to(x.device) - plan.router.to(x.device).mean(dim=0)
    bias = None if plan.router_bias is None else plan.router_bias - plan.router_bias.mean()
    if plan.top_k == plan.num_experts:
        router, bias = torch.zeros_like(router), None
    largest = max(float((part @ router.t().to(x.dtype)).abs().max()) for part in x.split(8192))
    flatness = _power_of_two(_FLATNESS / largest) if largest else plan.flatness
    return dataclasses.replace(
        plan,
        router=(router * flatness).to(dtype).float() / flatness,
        router_bias=bias,
        down=None if plan.down is None else plan.down.to(dtype),
        flatness=flatness,
    )


def _power_of_two(value: float) -> float:
    """Give the largest power of two that is not larger."""
    return 2.0 ** torch.tensor(value).log2().floor().int().item()
