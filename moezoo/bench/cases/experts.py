"""Mixtures of MLP experts: the experts with the routing given, and the whole layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import moezoo_kernels
from moezoo.bench.case import PLAIN, Case, Contender, Peer, Problem, Setting, Target, Work
from moezoo.bench.cases import expert_peers as by
from moezoo.bench.cases.expert_peers import Experts
from moezoo.bench.inputs import decided, top_k_margin
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions


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


_QUICK = {"T": 24, "d": 16, "E": 4, "k": 2, "h": 8}
_SAVED = 0.4
_OPS = ("grouped_mlp",)


def _case(
    name: str, title: str, sizes: Mapping[str, int], peers: Mapping[str, Peer], **changes: Any
) -> Case:
    return Case(
        name, "op", title, sizes, _QUICK, partial(_build_op, gated=True), peers, ops=_OPS, **changes
    )


def _sizes_of(tokens: int, width: int, hidden: int, experts: int, choices: int) -> dict[str, int]:
    return {"T": tokens, "d": width, "E": experts, "k": choices, "h": hidden}


def _cpu_peers(ratio: float) -> dict[str, Peer]:
    return {
        "transformers": Peer(
            by.transformers_experts,
            by.TRANSFORMERS,
            target=Target(forward=ratio, step=ratio, saved=_SAVED),
        ),
        "dense": Peer(by.dense, same=False, target=Target(forward=0.85)),
        PLAIN: Peer(by.plain),
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
        whole = replace(peers["transformers"], build=by.transformers_layer)
        cases += [
            Case(
                f"sparse-moe-{name}",
                "layer",
                "sparse MoE layer",
                sizes,
                _QUICK,
                _build_layer,
                {"transformers": whole},
                ops=_OPS,
            ),
            _case(f"experts-{name}", "experts of an MoE", sizes, peers),
            _case(f"experts-{name}-bf16", "experts of an MoE", sizes, peers, dtype=torch.bfloat16),
        ]
    tiny = Peer(by.transformers_experts, by.TRANSFORMERS, target=Target(step=1.5))
    sizes = _sizes_of(4096, 256, 128, 512, 8)
    return [*cases, _case("experts-e512", "experts of an MoE", sizes, {"transformers": tiny})]


def _cuda_peers(gated: bool) -> dict[str, Peer]:
    faster = Target(step=1.2)
    found = {
        "scattermoe": Peer(by.scattermoe, by.SCATTERMOE, target=faster),
        "megablocks": Peer(by.megablocks, by.MEGABLOCKS),
        "dense": Peer(by.dense, same=False, target=Target(step=0.75)),
        PLAIN: Peer(by.plain),
    }
    if not gated:
        return found
    leading = {
        "transformers": Peer(
            by.transformers_experts, by.TRANSFORMERS, target=Target(step=1.2, saved=1 / 3)
        ),
        "torchtitan": Peer(by.torchtitan, by.TORCHTITAN, target=faster),
    }
    return {**leading, **found}


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
