"""Product-key memory against its paper's formula, and what batch norm does to its use."""

import math

import pytest
import torch

import moezoo
from moezoo import ProductKeyMemory


def by_hand(layer: ProductKeyMemory, hidden: torch.Tensor) -> torch.Tensor:
    """Evaluate equations 2 to 4 of the paper, one token and one head at a time."""
    memory = layer.memory
    heads, _, n, half = memory.keys.keys.shape
    projected = hidden @ memory.query.proj.weight.T
    mean, var = projected.mean(0), projected.var(0, correction=0)
    queries = (projected - mean) / (var + 1e-5).sqrt() * memory.query.gain + memory.query.shift
    rows = []
    for token in queries:
        row = torch.zeros(layer.v_dim, dtype=hidden.dtype)
        for head, query in enumerate(token.reshape(heads, 2 * half)):
            whole = [
                torch.cat([memory.keys.keys[head, 0, i], memory.keys.keys[head, 1, j]])
                for i in range(n)
                for j in range(n)
            ]
            scores = torch.stack(whole) @ query
            best = scores.argsort(descending=True)[: layer.top_k]
            for weight, slot in zip(scores[best].softmax(0), best, strict=True):
                row = row + weight * memory.values.weight[slot]
        rows.append(row)
    return torch.stack(rows)


def test_output_is_the_papers_formula():
    layer = ProductKeyMemory(6, num_keys=5, num_heads=2, top_k=3, d_key=4).double()
    torch.nn.init.normal_(layer.memory.query.gain)
    torch.nn.init.normal_(layer.memory.query.shift)
    hidden = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden).hidden, by_hand(layer, hidden), rtol=1e-10, atol=0)


@pytest.mark.parametrize("query_norm", ["batch", "layer", "qk", "none"])
@pytest.mark.parametrize("v_dim", [None, 10])
@pytest.mark.parametrize("top_k", [1, 8])
def test_fast_path_equals_reference_for_every_option(query_norm, v_dim, top_k):
    layer = ProductKeyMemory(
        12,
        num_keys=8,
        num_heads=3,
        top_k=top_k,
        d_key=6,
        v_dim=v_dim,
        query_norm=query_norm,
        query_bias=True,
    ).double()
    hidden = torch.randn(20, 12, dtype=torch.float64)
    mask = torch.rand(20) < 0.7
    parameters = list(layer.parameters())
    results = []
    for call in (layer, layer.reference):
        output = call(hidden, mask=mask).hidden
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    assert not layer(hidden, mask=mask).hidden[~mask].any()


def test_gradients_equal_the_reference_in_fp32():
    layer = ProductKeyMemory(32, num_keys=16, num_heads=4, top_k=16)
    hidden = torch.randn(256, 32)
    values = layer.memory.values.weight
    fast, slow = (
        torch.autograd.grad(call(hidden).hidden.square().sum(), values)[0]
        for call in (layer, layer.reference)
    )
    assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()


def test_batch_norm_spreads_clustered_queries():
    """All tokens lie near one point: without a norm their queries do, and few slots are used."""
    stream = 3 * torch.randn(1, 32) + 0.3 * torch.randn(2000, 32)
    used, uneven = {}, {}
    for norm in ("batch", "none"):
        torch.manual_seed(1)
        layer = ProductKeyMemory(32, num_keys=32, num_heads=2, top_k=4, query_norm=norm)
        stats = layer(stream).stats
        used[norm], uneven[norm] = stats["usage"].item(), stats["unevenness"].item()
        assert stats["top1_usage"] <= stats["usage"]
    assert used["batch"] > 0.7
    assert used["none"] < 0.05
    assert uneven["batch"] < 0.25 * uneven["none"]


def test_a_memory_that_reads_one_slot_is_as_uneven_as_can_be():
    layer = ProductKeyMemory(16, num_keys=8, num_heads=1, top_k=1, query_norm="none")
    stats = layer(torch.randn(1, 16).expand(40, 16)).stats
    assert stats["unevenness"].item() == pytest.approx(math.log(64), rel=1e-6)
    assert stats["usage"].item() == pytest.approx(1 / 64)
    assert stats["expert_counts"].max() == 40


def test_large_memories_return_small_statistics():
    layer = ProductKeyMemory(16, num_keys=65, top_k=2)
    assert all(v.ndim == 0 for v in layer(torch.randn(3, 16)).stats.values())


def test_values_learn_at_a_constant_rate_without_decay():
    groups = {group.name: group for group in ProductKeyMemory(16).parameter_groups()}
    values = groups["values"]
    assert values.lr_multiplier == 4.0
    assert not values.weight_decay
    assert not values.schedule
    assert not values.sparse
    assert all(group.schedule for name, group in groups.items() if name != "values")
    frozen = ProductKeyMemory(16)
    frozen.memory.values.weight.requires_grad_(False)
    assert "values" not in {group.name for group in frozen.parameter_groups()}


def test_cost_is_the_formula_of_the_paper():
    d, h, n, c, k = 1024, 4, 512, 256, 32
    with torch.device("meta"):
        layer = ProductKeyMemory(d)
    sizes = (layer.num_keys, layer.num_heads, layer.d_key, layer.top_k, layer.v_dim)
    assert sizes == (n, h, c, k, d)
    cost = layer.cost()
    assert cost.total_parameters == h * n * c + n**2 * d + d * h * c + 2 * h * c
    assert cost.flops_per_token == 2 * d * h * c + 2 * h * n * c + 2 * h * k * d


def test_initial_scales_are_the_papers():
    layer = ProductKeyMemory(256)
    keys, values = layer.memory.keys.keys, layer.memory.values.weight
    assert keys.abs().max() <= (layer.d_key / 2) ** -0.5
    assert keys.std().item() == pytest.approx((3 * layer.d_key / 2) ** -0.5, rel=0.02)
    assert values.std().item() == pytest.approx(256**-0.5, rel=0.02)


def test_swap_shares_a_pool_within_one_model_only():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    factory = {"class_path": "moezoo.ProductKeyMemory", "init_args": {"value_pool": "m"}}
    first, second = (moezoo.swap(transformers.LlamaForCausalLM(config), factory) for _ in range(2))
    assert first[1].memory.table is first[0].memory.values
    assert second[0].memory.table is not first[0].memory.values
