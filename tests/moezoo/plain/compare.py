"""Compare a layer's fast path with its plain reference: output, losses, counts, every gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from plain import dense, hashing, neurons, product_key, sparse, tables, trees
from plain.parts import Answer, Call, Options, Weights
from torch import Tensor

from moezoo.feed_forward import FeedForward, FeedForwardOutput

TOLERANCE = 1e-10
VOCABULARY = 40

PLAIN: dict[str, Callable[[Weights, Options, Tensor, Call], Answer]] = {
    "CarvedMoE": sparse.carved_moe,
    "DenseFFN": dense.dense_ffn,
    "Engram": tables.engram,
    "FastFeedForward": trees.fast_feed_forward,
    "Finedeep": dense.finedeep,
    "HashLayer": hashing.hash_layer,
    "L3": tables.l3,
    "MemoryPlus": product_key.memory_plus,
    "MoLE": tables.mole,
    "PEER": product_key.peer,
    "PerLayerEmbedding": tables.per_layer_embedding,
    "PersistentMemoryAttention": dense.persistent_memory,
    "ProductKeyMemory": product_key.product_key_memory,
    "STEM": tables.stem,
    "SelectiveFFN": neurons.selective_ffn,
    "SigmaMoE": sparse.sigma_moe,
    "SparseMoE": sparse.sparse_moe,
    "TopKFFN": neurons.top_k_ffn,
    "UltraFastFFF": trees.ultra_fast_fff,
}


@torch.no_grad()
def randomize(layer: FeedForward) -> FeedForward:
    """Set every parameter and buffer to values that no initialization has: none is zero or one.

    Fixed input features then skew the choice: routers' columns of the first feature, which
    :func:`inputs` keeps away from zero, favour the first experts over the last.
    """
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("_proj.mask"):  # whatever its rule would have chosen
            tensor.copy_(torch.rand(tensor.shape, generator=generator) < 0.5)
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        last = name.rpartition(".")[2]
        if last == "running_var":
            drawn = 0.5 + drawn.square()
        elif (last in ("gain", "weight") or last.endswith("_scale")) and tensor.ndim == 1:
            drawn = 1 + 0.3 * drawn
        elif last == "progress":  # where no schedule has ended, and all have begun
            drawn = 0.2 + 0.05 * torch.tanh(drawn)
        elif last == "selection_bias":
            drawn *= 0.2 if _scores(layer) != "softmax" else 0.5 / tensor.numel()
        elif last == "threshold":  # one of them is cold
            drawn = (1 + 0.2 * drawn) * (0.6 if _scores(layer) != "softmax" else 1 / tensor.numel())
            drawn[2] = -1.0
        elif tensor.ndim < 2 or last.endswith("bias"):
            drawn *= 0.4
        else:
            drawn *= tensor.shape[-1] ** -0.5
        if name == "gate.weight":
            drawn[:, 0] += torch.linspace(1, -1, len(drawn))
        tensor.copy_(drawn)
    return layer


def _scores(layer: FeedForward) -> str:
    return getattr(getattr(layer, "router", None), "score", "softmax")


def inputs(layer: FeedForward, situation: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """Return hidden states and what else a call gets: padding, another router input, names."""
    generator = torch.Generator().manual_seed(1)
    shape = situation["shape"]
    hidden = torch.randn(*shape, layer.d_model, generator=generator, dtype=torch.float64)
    router_input = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    for tensor in (hidden, router_input):
        tensor[..., 0] = 1.0 + 0.1 * tensor[..., 0]
    mask = None
    if situation.get("masked"):
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[..., 0] = False
        if situation.get("empty_sequence"):
            mask[1] = False
    embeddings = None
    if situation.get("masked") and layer.reads_embeddings:
        embeddings = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    state = None
    if situation.get("masked") and layer.reads_router_state:
        wide = (*shape, layer.router_state_width)
        state = 2 * torch.randn(wide, generator=generator, dtype=torch.float64)
    return hidden, Call(
        training=situation["training"],
        mask=mask,
        router_input=router_input if situation.get("router_input") else None,
        token_ids=torch.randint(VOCABULARY, shape, generator=generator),
        positions=torch.arange(shape[-1]).expand(shape) if situation.get("masked") else None,
        embeddings=embeddings,
        router_state=state,
    )


def gradients(
    outcome: FeedForwardOutput | Answer, hidden: Tensor, call: Call, weights: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Return output, losses and the gradients of one scalar that all of them are part of."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(outcome.hidden.shape, generator=generator, dtype=torch.float64)
    total = (outcome.hidden * direction).sum()
    for place, name in enumerate(sorted(outcome.losses)):
        total = total + (place + 2) * outcome.losses[name]
    handed = outcome.router_state
    if handed is not None:
        total = total + (handed * torch.linspace(-1, 2, handed.shape[-1]).to(handed)).sum()
    leaves = {"d hidden": hidden} | {f"d {name}": tensor for name, tensor in weights.items()}
    if call.router_input is not None:
        leaves["d router_input"] = call.router_input
    for name in ("embeddings", "router_state"):
        if (given := getattr(call, name)) is not None:
            leaves[f"d {name}"] = given
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    losses = {f"loss {name}": loss.detach() for name, loss in outcome.losses.items()}
    if handed is not None:
        losses["handed"] = handed.detach()
    return {"hidden": outcome.hidden.detach(), **losses, **dict(zip(leaves, found, strict=True))}


def by_plain(layer: FeedForward, hidden: Tensor, call: Call) -> dict[str, Any]:
    """Return what a layer with these weights has to compute, by its plain reference."""
    weights = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    trained = {name: weights[name].requires_grad_() for name, _ in layer.named_parameters()}
    hidden, call = _leaves(hidden, call)
    torch.manual_seed(7)
    options = layer.config()["init_args"]
    answer = PLAIN[type(layer).__name__](weights, options, hidden, call)
    found: dict[str, Any] = gradients(answer, hidden, call, trained)
    found |= {f"state {name}": value for name, value in answer.state.items()}
    if answer.counts is not None:
        found["counts"] = torch.tensor(answer.counts)
    return found


def by_layer(
    layer: FeedForward, hidden: Tensor, call: Call, brute_force: bool = False
) -> dict[str, Any]:
    """Return what its fast path computes, or its own reference."""
    layer.train(call.training)
    hidden, call = _leaves(hidden, call)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    torch.manual_seed(7)
    outcome = (layer.reference if brute_force else layer)(
        hidden,
        token_ids=call.token_ids,
        router_input=call.router_input,
        mask=call.mask,
        positions=call.positions,
        embeddings=call.embeddings,
        **({"router_state": call.router_state} if layer.reads_router_state else {}),
    )
    found: dict[str, Any] = gradients(outcome, hidden, call, dict(layer.named_parameters()))
    for name, buffer in layer.named_buffers():
        if not torch.equal(buffer, before[name]):
            found[f"state {name}"] = buffer.clone()
            buffer.copy_(before[name])
    if "expert_counts" in outcome.stats:
        found["counts"] = outcome.stats["expert_counts"]
    return found


def _leaves(hidden: Tensor, call: Call) -> tuple[Tensor, Call]:
    for name in ("router_input", "embeddings", "router_state"):
        if (given := getattr(call, name)) is not None:
            call = call._replace(**{name: given.clone().requires_grad_()})
    return hidden.clone().requires_grad_(), call


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fail where anything differs by more than rounding in fp64; no gradient counts as zero."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        value = found[name]
        if value is None or right is None:
            other = right if value is None else value
            assert other is None or not other.any(), f"{name}: only one has a gradient"
            continue
        assert value.shape == right.shape, name
        if not right.numel():
            continue
        assert value.isfinite().all(), name
        # A sum that cancels, as in the gradient of a bias before a batch norm, leaves rounding.
        scale = right.abs().max().clamp(min=1e-4)
        error = (value - right).abs().max() / scale
        assert error <= TOLERANCE, f"{name}: off by {error:.1e} of its largest"


def assert_causal_as_declared(layer: FeedForward) -> None:
    """Fail unless earlier tokens' outputs change with later tokens exactly in a non-causal layer.

    All later tokens are changed to such as the first expert would rather take than any earlier one.
    Experts with a limit on capacity get room for all: what they drop is another matter.
    """
    layer.eval()
    if getattr(layer, "capacity", None) is not None:
        layer.gate.capacity = None
    hidden, call = inputs(layer, {"shape": (1, 24), "training": False})
    changed = hidden.clone()
    changed[:, 13:] = 3 * hidden[:, :11].flip(1)
    names = call.token_ids.clone()
    names[:, 13:] = (names[:, 13:] + 1) % VOCABULARY
    before, after = layer(hidden, token_ids=call.token_ids), layer(changed, token_ids=names)
    same = torch.allclose(before.hidden[:, :13], after.hidden[:, :13], rtol=0, atol=1e-12)
    assert same == layer.causal, f"earlier outputs are {'the same' if same else 'changed'}"
