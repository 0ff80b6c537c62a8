"""PEER: the layer, and its core with the selection given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.bench.case import (
    PLAIN,
    Case,
    Contender,
    Package,
    Peer,
    Problem,
    Setting,
    Target,
    Work,
    plain_torch,
)
from moezoo.bench.cases.tables import (
    bag_work,
    our_query_as_theirs,
    random_rows,
    their_keys_as_ours,
)
from moezoo.bench.inputs import decided, product_key_margin
from moezoo.experts.rank_one import RankOneExperts
from moezoo.layers.peer import PEER

_PEER_PYTORCH = Package("PEER_pytorch", "pip install PEER-pytorch")


@dataclass(frozen=True)
class _Layer:
    """Our layer, its tokens, and how it is called."""

    layer: PEER
    x: Tensor
    ours: Contender


@dataclass(frozen=True)
class _Core:
    """Tables, tokens and the selection, and how ours is called."""

    experts: RankOneExperts
    x: Tensor
    indices: Tensor
    weights: Tensor
    ours: Contender


def _build_layer(setting: Setting) -> Problem:
    """The function that PEER-pytorch computes: keys per head, queries not normalised."""
    tokens, width, n = setting["T"], setting["d"], setting["n"]
    with torch.device(setting.device):
        layer = PEER(
            width,
            num_experts=n * n,
            num_heads=setting["h"],
            top_k=setting["k"],
            d_key=width,
            query_norm="none",
            share_keys=False,
        ).to(setting.dtype)
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: product_key_margin(layer.keys, layer.query(drawn)),
        tokens,
    ).requires_grad_()
    operands = {
        "x": x,
        "query": layer.query.proj.weight,
        "keys": layer.keys.keys,
        "u": layer.experts.u,
        "v": layer.experts.v,
    }
    ours = Contender(lambda: layer(x).hidden, operands)
    with torch.no_grad():
        named = layer.route(x)[0].unique().numel()
    work, step_work = _with_selection(layer, setting, tokens, named)
    return Problem(ours, work, step_work, _Layer(layer, x, ours))


def _with_selection(layer: PEER, setting: Setting, tokens: int, named: int) -> tuple[Work, Work]:
    """Add queries and keys to the work of the core."""
    rows = layer.num_heads * layer.top_k
    core = bag_work(tokens, rows, layer.d_model, setting.item, 2, named, layer.num_experts)
    weights = layer.query.proj.weight.nbytes + layer.keys.keys.nbytes
    flops = tokens * (layer.query.flops_per_token() + layer.keys.flops_per_token())
    forward, step = core
    return (
        Work(forward.flops + flops, forward.read + weights, forward.written),
        Work(step.flops + 3 * flops, step.read + 2 * weights, step.written + weights),
    )


def _build_core(setting: Setting) -> Problem:
    """The experts alone, random ones; every token asks h k of them."""
    tokens, width, n = setting["T"], setting["d"], setting["n"]
    choices = setting["h"] * setting["k"]
    with torch.device(setting.device):
        experts = RankOneExperts(width, n * n, choices, activation="gelu", gated=False).to(
            setting.dtype
        )
    x = setting.normal(tokens, width).requires_grad_()
    indices, weights = random_rows(setting, tokens, choices, n * n)
    weights.requires_grad_()
    ours = Contender(
        lambda: experts(x, indices, weights),
        {"x": x, "u": experts.u, "v": experts.v, "weights": weights},
        constants=(indices,),
    )
    named = indices.unique().numel()
    work, step_work = bag_work(tokens, choices, width, setting.item, 2, named, n * n)
    return Problem(ours, work, step_work, _Core(experts, x, indices, weights, ours))


def _plain(parts: _Layer | _Core) -> Contender:
    return plain_torch(parts.ours, "rank_one_experts", "product_key_top_k")


def _peer_pytorch(parts: _Layer) -> Contender:
    """PEER-pytorch; its default would keep one expert per head and weight it by a ReLU."""
    from PEER_pytorch import PEER as Theirs

    layer, heads = parts.layer, parts.layer.num_heads
    with torch.device("meta"):
        theirs: Any = Theirs(
            layer.d_model,
            heads=heads,
            num_experts=layer.num_experts,
            num_experts_per_head=layer.top_k,
            dim_key=layer.d_key // 2,
            non_competing_scores=False,
        )
    query = our_query_as_theirs(layer.query.proj.weight.detach(), heads)
    theirs.to_queries[0].weight = nn.Parameter(query)
    theirs.keys = nn.Parameter(layer.keys.keys.detach().transpose(1, 2).contiguous())
    theirs.weight_down_embed.weight = nn.Parameter(layer.experts.u.detach())
    theirs.weight_up_embed.weight = nn.Parameter(layer.experts.v.detach())
    return Contender(
        lambda: theirs(parts.x.unsqueeze(0)).squeeze(0),
        {
            "x": parts.x,
            "query": theirs.to_queries[0].weight,
            "keys": theirs.keys,
            "u": theirs.weight_down_embed.weight,
            "v": theirs.weight_up_embed.weight,
        },
        lambda found: their_keys_as_ours(found, heads),
        note="non_competing_scores=False",
    )


def _gather(parts: _Core) -> Contender:
    """Algorithm 1 as written: gather the rows of every token, two products."""
    x, indices, weights = parts.x, parts.indices, parts.weights
    u, v = parts.experts.u, parts.experts.v

    def forward() -> Tensor:
        inner = torch.einsum("td,tjd->tj", x, F.embedding(indices, u))
        return torch.einsum("tj,tjd->td", F.gelu(inner) * weights, F.embedding(indices, v))

    return Contender(forward, parts.ours.operands, constants=(indices,))


_QUICK = {"T": 12, "d": 16, "h": 2, "k": 3, "n": 8}
_LESS_MEMORY = 0.3


_OPS = ("rank_one_experts", "product_key_top_k")


def _sizes(tokens: int, width: int, n: int) -> dict[str, int]:
    return {"T": tokens, "d": width, "h": 8, "k": 16, "n": n}


def _layer_case(n: int, forward: float | None, step: float | None, **changes: Any) -> Case:
    target = None
    if forward is not None:
        target = Target(forward=forward, step=step, memory=_LESS_MEMORY)
    peers: Mapping[str, Peer] = {
        "PEER-pytorch": Peer(_peer_pytorch, _PEER_PYTORCH, target=target),
        PLAIN: Peer(_plain),
    }
    sizes = _sizes(2048, 512, n)
    return Case(
        f"peer-{n}",
        "layer",
        "PEER layer",
        sizes,
        _QUICK,
        _build_layer,
        peers,
        series="PEER layer: half-keys n of n² experts",
        size="n",
        ops=_OPS,
        **changes,
    )


CASES = [
    _layer_case(128, None, None),
    _layer_case(256, 3.5, 3.0),
    _layer_case(512, 4.0, 3.0),
    Case(
        "peer-core",
        "op",
        "PEER core",
        _sizes(2048, 512, 256),
        _QUICK,
        _build_core,
        {"gather": Peer(_gather), PLAIN: Peer(_plain)},
        limit=Target(of_limit=0.6, step_of_limit=0.6),
        ops=("rank_one_experts",),
    ),
    Case(
        "peer-1024-cuda",
        "layer",
        "PEER layer",
        _sizes(16384, 1024, 1024),
        _QUICK,
        _build_layer,
        {
            "PEER-pytorch": Peer(
                _peer_pytorch, _PEER_PYTORCH, target=Target(step=10.0, memory=0.1)
            ),
            PLAIN: Peer(_plain),
        },
        device="cuda",
        ops=_OPS,
    ),
]
