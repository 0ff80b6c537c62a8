"""Mixtures of MLP experts: the experts with the routing given, and the whole layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moezoo_kernels
from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Gradients,
    Package,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo.bench.inputs import decided, top_k_margin
from moezoo.layers.dense import DenseFFN
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions

TRANSFORMERS = Package("transformers")
SCATTERMOE = Package(
    "scattermoe", "pip install --no-deps git+https://github.com/shawntan/scattermoe"
)
MEGABLOCKS = Package("megablocks", "see 'megablocks' in README.md")
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
        """What gradients are taken of, with the routing given."""
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


def _build_op(setting: Setting, gated: bool) -> Problem:
    """``grouped_mlp`` with even random routing."""
    tokens, width, experts, choices, hidden = _sizes(setting)
    inner = 2 * hidden if gated else hidden
    x = setting.normal(tokens, width).requires_grad_()
    w_in = (setting.normal(experts, inner, width) * width**-0.5).requires_grad_()
    w_out = (setting.normal(experts, width, hidden) * hidden**-0.5).requires_grad_()
    scores, indices = torch.randn(tokens, experts, device=setting.device).topk(choices, dim=-1)
    weights = scores.softmax(dim=-1).requires_grad_()
    activation = "silu" if gated else "gelu"
    ours = Contender(
        lambda: moezoo_kernels.grouped_mlp(
            x, w_in, w_out, indices, weights, activation=activation, gated=gated
        ),
        {"x": x, "w_in": w_in, "w_out": w_out, "weights": weights},
        constants=(indices,),
    )
    parts = Experts(x, w_in, w_out, indices, weights, gated, ours)
    work, step_work = _work(parts, setting.item)
    return Problem(ours, work, step_work, parts)


def _build_layer(setting: Setting) -> Problem:
    """A whole SwiGLU layer with Mixtral's router, in training mode, without auxiliary loss."""
    tokens, width, experts, choices, hidden = _sizes(setting)
    layer = SparseMoE(
        width,
        num_experts=experts,
        top_k=choices,
        d_expert=hidden,
        balance=BalanceOptions(load_balancing=0.0),
    ).to(setting.device, setting.dtype)
    router = layer.gate.weight
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: top_k_margin(drawn.float() @ router.float().t(), choices),
        tokens,
    ).requires_grad_()
    stack = layer.experts
    operands = {"x": x, "w_in": stack.gate_up_proj, "w_out": stack.down_proj, "router": router}
    ours = Contender(lambda: layer(x).hidden, operands)
    with torch.no_grad():
        routing = layer.route(x)
    parts = Experts(
        x,
        stack.gate_up_proj,
        stack.down_proj,
        routing.indices,
        routing.weights,
        True,
        ours,
        router,
    )
    work, step_work = _work(parts, setting.item)
    return Problem(ours, work, step_work, parts)


def _sizes(setting: Setting) -> tuple[int, int, int, int, int]:
    return setting["T"], setting["d"], setting["E"], setting["k"], setting["h"]


def _work(parts: Experts, item: int) -> tuple[Work, Work]:
    """All weights and tokens read once, each product once forward and twice backward."""
    products = parts.w_in[0].numel() + parts.w_out[0].numel()
    flops = 2.0 * parts.indices.numel() * products
    weights = parts.w_in.nbytes + parts.w_out.nbytes
    tokens = parts.x.numel() * item
    forward = Work(flops, weights + tokens, tokens)
    return forward, Work(3 * flops, 2 * weights + 2 * tokens, weights + 2 * tokens)


def _plain(parts: Experts) -> Contender:
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


def _transformers_experts(parts: Experts) -> Contender:
    config, module = _mixtral(parts)
    with torch.device("meta"):
        experts = module.MixtralExperts(config)
    operands = _take_weights(experts, parts)
    operands = {"x": parts.x, **operands, "weights": parts.weights}
    return Contender(
        lambda: experts(parts.x, parts.indices, parts.weights), operands, constants=(parts.indices,)
    )


def _transformers_layer(parts: Experts) -> Contender:
    assert parts.router is not None
    config, module = _mixtral(parts)
    with torch.device("meta"):
        block = module.MixtralSparseMoeBlock(config)
    operands = {"x": parts.x, **_take_weights(block.experts, parts)}
    block.gate.weight = nn.Parameter(parts.router.detach())
    operands["router"] = block.gate.weight
    return Contender(lambda: block(parts.x.unsqueeze(0)).squeeze(0), operands)


def _take_weights(experts: Any, parts: Experts) -> dict[str, Tensor]:
    """Put our weights into transformers' experts, whose layout is ours."""
    experts.gate_up_proj = nn.Parameter(parts.w_in.detach())
    experts.down_proj = nn.Parameter(parts.w_out.detach())
    return {"w_in": experts.gate_up_proj, "w_out": experts.down_proj}


def _dense(parts: Experts) -> Contender:
    """A dense block of K F hidden units: as many FLOPs as the experts of a token."""
    _, width, _, choices, hidden = parts.sizes
    block = DenseFFN(width, choices * hidden, activation=parts.activation, gated=parts.gated)
    block = block.to(parts.x.device, parts.x.dtype)
    operands = {"x": parts.x, **dict(block.named_parameters())}
    return Contender(lambda: block(parts.x).hidden, operands, note="equal active FLOPs")


def _scattermoe(parts: Experts) -> Contender:
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


def _megablocks(parts: Experts) -> Contender:
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


def _torchtitan(parts: Experts) -> Contender:
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
    """Give the gate's and the linear half of the first matrices, or the only one: contiguous."""
    return [part.contiguous() for part in parts.w_in.detach().chunk(2 if parts.gated else 1, 1)]


_QUICK = {"T": 24, "d": 16, "E": 4, "k": 2, "h": 8}
_SAVED = 0.4


def _case(
    name: str, title: str, sizes: Mapping[str, int], peers: Mapping[str, Peer], **changes: Any
) -> Case:
    return Case(name, "op", title, sizes, _QUICK, partial(_build_op, gated=True), peers, **changes)


def _sizes_of(tokens: int, width: int, hidden: int, experts: int, choices: int) -> dict[str, int]:
    return {"T": tokens, "d": width, "E": experts, "k": choices, "h": hidden}


def _cpu_peers(ratio: float) -> dict[str, Peer]:
    return {
        "transformers": Peer(
            _transformers_experts,
            TRANSFORMERS,
            target=Target(forward=ratio, step=ratio, saved=_SAVED),
        ),
        "dense": Peer(_dense, same=False, target=Target(forward=0.85)),
        PLAIN: Peer(_plain),
    }


def _cpu_cases() -> list[Case]:
    """Few large and many small experts of equal active FLOPs, in fp32 and bf16."""
    shapes = {
        "e8": (_sizes_of(4096, 512, 1024, 8, 2), 1.0),
        "e64": (_sizes_of(4096, 512, 256, 64, 8), 1.2),
    }
    cases = []
    for name, (sizes, ratio) in shapes.items():
        peers = _cpu_peers(ratio)
        whole = replace(peers["transformers"], build=_transformers_layer)
        cases += [
            Case(
                f"sparse-moe-{name}",
                "layer",
                "sparse MoE layer",
                sizes,
                _QUICK,
                _build_layer,
                {"transformers": whole},
            ),
            _case(f"experts-{name}", "experts of an MoE", sizes, peers),
            _case(f"experts-{name}-bf16", "experts of an MoE", sizes, peers, dtype=torch.bfloat16),
        ]
    return cases


def _cuda_peers(gated: bool) -> dict[str, Peer]:
    faster = Target(step=1.2)
    peers = {
        "scattermoe": Peer(_scattermoe, SCATTERMOE, target=faster),
        "megablocks": Peer(_megablocks, MEGABLOCKS),
        "dense": Peer(_dense, same=False, target=Target(step=0.75)),
        PLAIN: Peer(_plain),
    }
    if not gated:
        return peers
    leading = {
        "transformers": Peer(
            _transformers_experts, TRANSFORMERS, target=Target(step=1.2, saved=1 / 3)
        ),
        "torchtitan": Peer(_torchtitan, TORCHTITAN, target=faster),
    }
    return {**leading, **peers}


def _cuda_case(
    name: str, title: str, sizes: dict[str, int], gated: bool = True, **changes: Any
) -> Case:
    return replace(
        _case(name, title, sizes, _cuda_peers(gated), device="cuda", dtype=torch.bfloat16),
        build=partial(_build_op, gated=gated),
        **changes,
    )


def _cuda_cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B and of the papers of SonicMoE, ScatterMoE and MegaBlocks."""
    cases = [_cuda_case("qwen3-30b", "Qwen3-30B experts", _sizes_of(16384, 2048, 768, 128, 8))]
    for tokens, width, most in ((40960, 768, 128), (24576, 1536, 128), (32768, 4096, 256)):
        for shift, hidden in enumerate((256, 512, 1024)):
            experts, choices = most >> shift, most >> shift + 4
            sizes = _sizes_of(tokens, width, hidden, experts, choices)
            cases.append(_cuda_case(f"sonic-d{width}-n{hidden}", "SonicMoE shape", sizes))
    for tokens in (4096, 8192, 16384, 30720, 61440):
        sizes = _sizes_of(tokens, 4096, 1024, 64, 8)
        cases.append(
            _cuda_case(
                f"scatter-t{tokens}",
                "ScatterMoE shape",
                sizes,
                gated=False,
                series="ScatterMoE: tokens",
                size="T",
            )
        )
    for choices in (1, 2, 4, 8, 16):
        sizes = _sizes_of(16384, 4096, 8192 // choices, 8 * choices, choices)
        cases.append(
            _cuda_case(
                f"scatter-k{choices}",
                "ScatterMoE granularity",
                sizes,
                gated=False,
                series="ScatterMoE: granularity",
                size="k",
            )
        )
    for tokens, width, hidden, experts in (
        (65536, 512, 2048, 64),
        (32768, 768, 3072, 64),
        (8192, 1024, 4096, 64),
        (8192, 4096, 16384, 4),
    ):
        sizes = _sizes_of(tokens, width, hidden, experts, 1)
        cases.append(
            _cuda_case(f"megablocks-d{width}-e{experts}", "MegaBlocks shape", sizes, False)
        )
    return cases


CASES = [*_cpu_cases(), *_cuda_cases()]
