"""Memory layers: the table of values, and the whole layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
from moezoo.experts.values import ValueTable
from moezoo.layers.product_key_memory import ProductKeyMemory

_PRODUCT_KEY_MEMORY = Package("product_key_memory")


@dataclass(frozen=True)
class _Values:
    """The table, the rows read, and how ours is called."""

    table: ValueTable
    indices: Tensor
    weights: Tensor
    ours: Contender


@dataclass(frozen=True)
class _Layer:
    """Our layer, its tokens, and how it is called."""

    layer: ProductKeyMemory
    x: Tensor
    ours: Contender


def _build_values(setting: Setting, sparse: bool) -> Problem:
    tokens, width, n = setting["T"], setting["d"], setting["n"]
    choices = setting["h"] * setting["k"]
    with torch.device(setting.device):
        table = ValueTable(n * n, width, sparse=sparse).to(setting.dtype)
    indices, weights = random_rows(setting, tokens, choices, n * n)
    weights = weights.to(setting.dtype).requires_grad_()
    ours = Contender(
        lambda: table(indices, weights, None),
        {"values": table.weight, "weights": weights},
        constants=(indices,),
    )
    named = indices.unique().numel()
    rows = named if sparse else n * n
    work, step_work = bag_work(tokens, choices, width, setting.item, 1, named, rows)
    return Problem(ours, work, step_work, _Values(table, indices, weights, ours))


def _build_layer(setting: Setting) -> Problem:
    """Without a norm of the queries: the package's is over each half, ours over the whole."""
    tokens, width, n = setting["T"], setting["d"], setting["n"]
    with torch.device(setting.device):
        layer = ProductKeyMemory(
            width,
            num_keys=n,
            num_heads=setting["h"],
            top_k=setting["k"],
            d_key=setting["c"],
            query_norm="none",
        ).to(setting.dtype)
    memory = layer.memory
    x = decided(
        lambda count: setting.normal(count, width),
        lambda drawn: product_key_margin(memory.keys, memory.query(drawn)),
        tokens,
    ).requires_grad_()
    operands = {
        "x": x,
        "query": memory.query.proj.weight,
        "keys": memory.keys.keys,
        "values": memory.table.weight,
    }
    ours = Contender(lambda: layer(x).hidden, operands)
    with torch.no_grad():
        named = memory.keys(memory.query(x))[1].unique().numel()
    rows = memory.rows_per_token()
    forward, step = bag_work(tokens, rows, width, setting.item, 1, named, n * n)
    flops = tokens * (memory.query.flops_per_token() + memory.keys.flops_per_token())
    weights = memory.query.proj.weight.nbytes + memory.keys.keys.nbytes
    work = Work(forward.flops + flops, forward.read + weights + x.nbytes, forward.written)
    step_work = Work(step.flops + 3 * flops, step.read + 2 * weights, step.written + weights)
    return Problem(ours, work, step_work, _Layer(layer, x, ours))


def _plain_values(parts: _Values) -> Contender:
    return plain_torch(parts.ours, "weighted_bag")


def _plain_layer(parts: _Layer) -> Contender:
    return plain_torch(parts.ours, "weighted_bag", "product_key_top_k")


def _embedding_bag(parts: _Values) -> Contender:
    table, indices, weights = parts.table, parts.indices, parts.weights
    return Contender(
        lambda: F.embedding_bag(
            indices, table.weight, mode="sum", per_sample_weights=weights, sparse=table.sparse
        ),
        parts.ours.operands,
        constants=(indices,),
    )


def _product_key_memory(parts: _Layer) -> Contender:
    """The package by its default formula, its layer norm of the half-queries taken out."""
    from product_key_memory import PKM

    memory = parts.layer.memory
    heads = memory.keys.num_heads
    with torch.device("meta"):
        theirs: Any = PKM(
            parts.layer.d_model,
            heads=heads,
            num_keys=memory.keys.num_keys,
            topk=memory.keys.top_k,
            dim_head=memory.keys.d_key // 2,
        )
    theirs.norm = nn.Identity()
    query = our_query_as_theirs(memory.query.proj.weight.detach(), heads)
    theirs.to_queries.weight = nn.Parameter(query)
    theirs.keys = nn.Parameter(memory.keys.keys.detach().transpose(1, 2).contiguous())
    theirs.values.weight = nn.Parameter(memory.table.weight.detach())
    return Contender(
        lambda: theirs(parts.x.unsqueeze(0)).squeeze(0),
        {
            "x": parts.x,
            "query": theirs.to_queries.weight,
            "keys": theirs.keys,
            "values": theirs.values.weight,
        },
        lambda found: their_keys_as_ours(found, heads),
        note="without its LayerNorm of half-queries",
    )


_QUICK = {"T": 12, "d": 16, "h": 2, "k": 3, "n": 8}


def _values_case(
    name: str, sparse: bool, sizes: dict[str, int], target: Target, **changes: Any
) -> Case:
    kind = "sparse" if sparse else "dense"
    peers = {
        "embedding_bag": Peer(_embedding_bag, target=target),
        PLAIN: Peer(_plain_values),
    }
    return Case(
        name,
        "op",
        f"memory values, {kind} gradient",
        sizes,
        _QUICK,
        partial(_build_values, sparse=sparse),
        peers,
        ops=("weighted_bag",),
        **changes,
    )


_CPU = {"T": 2048, "d": 512, "h": 4, "k": 32, "n": 512}
_CUDA = {"T": 32768, "d": 1024, "h": 4, "k": 32, "n": 1024}

CASES = [
    _values_case("memory-values", False, _CPU, Target(forward=1.0, step=1.4)),
    _values_case("memory-values-sparse", True, _CPU, Target(forward=1.0, step=1.5)),
    Case(
        "memory-layer",
        "layer",
        "product-key memory layer",
        {**_CPU, "c": 256},
        {**_QUICK, "c": 8},
        _build_layer,
        {
            "product-key-memory": Peer(
                _product_key_memory, _PRODUCT_KEY_MEMORY, target=Target(forward=5.0, step=2.5)
            ),
            PLAIN: Peer(_plain_layer),
        },
        ops=("weighted_bag", "product_key_top_k"),
    ),
    _values_case(
        "memory-values-cuda",
        False,
        _CUDA,
        Target(backward=5.0),
        limit=Target(of_limit=0.8),
        device="cuda",
        dtype=torch.bfloat16,
    ),
]
