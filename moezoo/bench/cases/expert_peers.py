"""Other implementations of mixtures of MLP experts, each with our weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.bench.case import Contender, Gradients, Package, plain_torch
from moezoo.layers.dense import DenseFFN

TRANSFORMERS = Package("transformers")
SCATTERMOE = Package(
    "scattermoe", "pip install --no-deps git+https://github.com/shawntan/scattermoe"
)
MEGABLOCKS = Package("megablocks", "see 'megablocks' in docs/quickstart.md")
TORCHTITAN = Package("torchtitan", "pip install --no-deps torchtitan spmd_types torchdata tyro")


@dataclass(frozen=True)
class Experts:
    """Operands of a grouped MLP, and the layer or op that reads them.

    Attributes:
        x: ``(T, D)``.
        w_in: ``(E, 2 F or F, D)``, the gate's rows first.
        w_out: ``(E, D, F)``.
        indices: ``(T, K)`` int64.
        weights: ``(T, K)`` fp32.
        gated: SwiGLU, or an MLP with GELU.
        ours: the op.
        router: ``(E, D)``, for the whole layer.
    """

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    indices: Tensor
    weights: Tensor
    gated: bool
    ours: Contender
    router: Tensor | None = None

    @property
    def operands(self) -> dict[str, Tensor]:
        """The operands whose gradients are taken, with the routing given."""
        return {"x": self.x, "w_in": self.w_in, "w_out": self.w_out, "weights": self.weights}

    @property
    def activation(self) -> Literal["silu", "gelu"]:
        """The activation's name."""
        return "silu" if self.gated else "gelu"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, D, E, K, F."""
        (tokens, width), choices = self.x.shape, self.indices.shape[1]
        return tokens, width, self.w_out.shape[0], choices, self.w_out.shape[2]


def plain(parts: Experts) -> Contender:
    """Ours, without a fused backend."""
    return plain_torch(parts.ours, "grouped_mlp")


def _mixtral(parts: Experts) -> tuple[Any, Any]:
    """Mixtral's configuration and module, which transformers runs through grouped_mm."""
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral

    _, width, experts, choices, hidden = parts.sizes
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=experts,
        num_experts_per_tok=choices,
    )
    config._experts_implementation = "grouped_mm"
    return config, modeling_mixtral


def transformers_experts(parts: Experts) -> Contender:
    """Mixtral's experts, with the routing given."""
    config, module = _mixtral(parts)
    with torch.device("meta"):
        experts = module.MixtralExperts(config)
    operands = _take_weights(experts, parts)
    operands = {"x": parts.x, **operands, "weights": parts.weights}
    return Contender(
        lambda: experts(parts.x, parts.indices, parts.weights), operands, constants=(parts.indices,)
    )


def transformers_layer(parts: Experts) -> Contender:
    """Mixtral's block, router included."""
    assert parts.router is not None
    config, module = _mixtral(parts)
    with torch.device("meta"):
        block = module.MixtralSparseMoeBlock(config)
    operands = {"x": parts.x, **_take_weights(block.experts, parts)}
    block.gate.weight = nn.Parameter(parts.router.detach())
    operands["router"] = block.gate.weight
    return Contender(lambda: block(parts.x.unsqueeze(0)).squeeze(0), operands)


def _take_weights(experts: Any, parts: Experts) -> dict[str, Tensor]:
    """Copy our weights into transformers' experts, whose layout is ours."""
    experts.gate_up_proj = nn.Parameter(parts.w_in.detach())
    experts.down_proj = nn.Parameter(parts.w_out.detach())
    return {"w_in": experts.gate_up_proj, "w_out": experts.down_proj}


def dense(parts: Experts) -> Contender:
    """A dense block of K F hidden units: as many FLOPs as the experts of a token."""
    _, width, _, choices, hidden = parts.sizes
    block = DenseFFN(width, choices * hidden, activation=parts.activation, gated=parts.gated)
    block = block.to(parts.x.device, parts.x.dtype)
    operands = {"x": parts.x, **dict(block.named_parameters())}
    return Contender(lambda: block(parts.x).hidden, operands, note="equal active FLOPs")


def scattermoe(parts: Experts) -> Contender:
    """Its gated MLP has the linear half first, and takes router weights in the tokens' dtype."""
    from scattermoe.mlp import GLUMLP, MLP

    _, width, experts, choices, hidden = parts.sizes
    make, activation = (GLUMLP, nn.SiLU()) if parts.gated else (MLP, nn.GELU())
    block = make(width, hidden, experts, choices, activation=activation)
    w_in = parts.w_in.detach()
    block.experts.weight = nn.Parameter(w_in.roll(hidden, dims=1) if parts.gated else w_in)
    block.output_experts.weight = nn.Parameter(parts.w_out.detach())
    operands = {
        "x": parts.x,
        "w_in": block.experts.weight,
        "w_out": block.output_experts.weight,
        "weights": parts.weights,
    }

    def as_ours(found: Gradients) -> Gradients:
        # Half the rows further, the halves have changed places.
        return {**found, "w_in": found["w_in"].roll(hidden, dims=1)} if parts.gated else found

    return Contender(
        lambda: block(parts.x, parts.weights.to(parts.x.dtype), parts.indices),
        operands,
        as_ours,
        (parts.indices,),
    )


def megablocks(parts: Experts) -> Contender:
    """Its dropless experts, through grouped GEMMs; the matrices of all experts are stacked rows."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    _, width, experts, choices, hidden = parts.sizes
    block = ParallelDroplessMLP(
        Arguments(
            hidden_size=width,
            ffn_hidden_size=hidden,
            moe_num_experts=experts,
            moe_top_k=choices,
            moe_loss_weight=0.0,
            bias=False,
            return_bias=False,
            activation_fn=F.silu if parts.gated else F.gelu,
            mlp_type="glu" if parts.gated else "mlp",
            mlp_impl="grouped",
            fp16=False,
            bf16=parts.x.dtype == torch.bfloat16,
            device=parts.x.device,
        )
    )
    mlp, names = block.mlp, ("w1", "v1") if parts.gated else ("w1",)
    for name, part in zip(names, _halves(parts), strict=True):
        setattr(mlp, name, nn.Parameter(part.flatten(0, 1)))
    mlp.w2 = nn.Parameter(parts.w_out.detach().mT.flatten(0, 1))
    operands = {"x": parts.x, **{name: getattr(mlp, name) for name in (*names, "w2")}}

    def as_ours(found: Gradients) -> Gradients:
        stacked = {n: found[n].unflatten(0, (experts, hidden)) for n in (*names, "w2")}
        w_in = torch.cat([stacked[name] for name in names], dim=1)
        return {**found, "w_in": w_in, "w_out": stacked["w2"].mT}

    return Contender(
        lambda: block(parts.x.unsqueeze(0), None, parts.weights, parts.indices).squeeze(0),
        {**operands, "weights": parts.weights},
        as_ours,
        (parts.indices,),
    )


def torchtitan(parts: Experts) -> Contender:
    """Its routed experts on one device; written for version 0.3, which computes in bf16."""
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    _, width, experts, choices, hidden = parts.sizes
    block = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=experts),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=choices),
    ).build()
    inner = block.inner_experts
    gate, up = _halves(parts)
    inner.w1_EFD, inner.w3_EFD = nn.Parameter(gate), nn.Parameter(up)
    inner.w2_EDF = nn.Parameter(parts.w_out.detach())
    operands = {"x": parts.x, "gate": inner.w1_EFD, "up": inner.w3_EFD, "w_out": inner.w2_EDF}
    counts = torch.bincount(parts.indices.flatten(), minlength=experts)

    def as_ours(found: Gradients) -> Gradients:
        return {**found, "w_in": torch.cat([found["gate"], found["up"]], dim=1)}

    return Contender(
        lambda: block(
            parts.x.unsqueeze(0), parts.weights.unsqueeze(0), parts.indices.unsqueeze(0), counts
        ).squeeze(0),
        {**operands, "weights": parts.weights},
        as_ours,
        (parts.indices, counts),
    )


def _halves(parts: Experts) -> list[Tensor]:
    """Return the gate's and the linear half of the first matrices, or the only one: contiguous."""
    return [part.contiguous() for part in parts.w_in.detach().chunk(2 if parts.gated else 1, 1)]
