"""Memory+ against its paper's formula; what it adds to a product-key memory."""

import pytest
import torch
import torch.nn.functional as F

from moezoo import MemoryPlus


@pytest.mark.parametrize("v_dim", [None, 10])
def test_output_is_the_gated_lookup(v_dim):
    layer = MemoryPlus(8, num_keys=6, num_heads=2, top_k=4, d_key=4, v_dim=v_dim).double()
    hidden = torch.randn(9, 8, dtype=torch.float64)
    memory = layer.memory
    read = torch.zeros(9, layer.v_dim, dtype=torch.float64)
    queries = (hidden @ memory.query.proj.weight.T).reshape(9, 2, 2, 2)
    for head in range(2):
        halves = torch.einsum("tsc,snc->stn", queries[:, head], memory.keys.keys[head])
        sums = (halves[0].unsqueeze(2) + halves[1].unsqueeze(1)).flatten(1)
        kept = sums >= sums.sort(dim=1, descending=True).values[:, 3:4]
        weights = sums.masked_fill(~kept, -torch.inf).softmax(dim=1)
        read += weights @ memory.values.weight
    gate = F.silu(hidden @ layer.gate_proj.weight.T)
    expected = (read * gate) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(hidden).hidden, expected, rtol=1e-10, atol=1e-14)


def hashing_memory(layer: MemoryPlus, hidden: torch.Tensor) -> torch.Tensor:
    """Write out the authors' ``HashingMemory``, its three biases included, over all slots."""
    memory, gate, out = layer.memory, layer.gate_proj, layer.out_proj
    heads, _, _, half = memory.keys.keys.shape
    queries = hidden @ memory.query.proj.weight.T + memory.query.proj.bias
    queries = queries.view(len(hidden), heads, 2, half)
    first, second = (
        torch.einsum("thc,hnc->thn", queries[:, :, i], memory.keys.keys[:, i]) for i in range(2)
    )
    scores = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)  # slot i n + j
    least = scores.sort(dim=-1, descending=True).values[..., layer.top_k - 1, None]
    weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1).sum(1)
    read = weights @ memory.values.weight
    gated = read * F.silu(hidden @ gate.weight.T + gate.bias)
    return gated @ out.weight.T + out.bias


@pytest.mark.parametrize("top_k", [1, 4, 6])
def test_equals_the_authors_layer_with_its_biases(top_k):
    layer = MemoryPlus(8, num_keys=6, num_heads=3, top_k=top_k, d_key=4, v_dim=5, query_bias=True)
    layer.gate_proj, layer.out_proj = torch.nn.Linear(8, 5), torch.nn.Linear(5, 8)
    layer = layer.double()
    torch.nn.init.normal_(layer.memory.query.proj.bias)
    hidden = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(31, 8, dtype=torch.float64)
    inputs = [hidden, *layer.parameters()]
    found, wanted = (
        [output, *torch.autograd.grad((output * direction).sum(), inputs)]
        for output in (layer(hidden).hidden, hashing_memory(layer, hidden))
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("query_norm", ["batch", "layer", "qk", "none"])
@pytest.mark.parametrize("v_dim", [None, 10])
def test_fast_path_equals_reference_for_every_option(query_norm, v_dim):
    layer = MemoryPlus(
        12,
        num_keys=8,
        num_heads=3,
        top_k=5,
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
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-13)
    assert not layer(hidden, mask=mask).hidden[~mask].any()


def test_qk_norm_keeps_scores_bounded_when_queries_grow():
    def largest_weight(norm: str) -> float:
        torch.manual_seed(0)
        layer = MemoryPlus(32, num_keys=16, top_k=8, query_norm=norm)
        layer.memory.query.proj.weight.data *= 1000
        scores, _ = layer.memory.keys(layer.memory.query(torch.randn(200, 32)))
        return scores.softmax(-1).amax(-1).mean().item()

    assert largest_weight("none") > 0.95  # saturated: no gradient reaches the others
    assert largest_weight("qk") < 0.5


def test_defaults_are_the_papers_at_its_width():
    d, h, n, c, k = 2048, 4, 1024, 1024, 32
    with torch.device("meta"):
        layer = MemoryPlus(d)
    sizes = (layer.num_keys, layer.num_heads, layer.d_key, layer.top_k, layer.v_dim)
    assert sizes == (n, h, c, k, d)
    cost = layer.cost()
    assert cost.total_parameters == h * n * c + n**2 * d + d * h * c + 2 * d * d
    flops = 2 * d * h * c + 2 * h * n * c + 2 * h * k * d + 4 * d * d
    assert cost.flops_per_token == flops


def test_initial_scales_are_the_authors():
    layer = MemoryPlus(128, v_dim=64)
    keys, query = layer.memory.keys.keys, layer.memory.query.proj.weight
    assert keys.abs().max() <= layer.d_key**-0.5
    assert query.abs().max() <= (6 / sum(query.shape)) ** 0.5  # Xavier's uniform distribution
    assert query.std().item() == pytest.approx((2 / sum(query.shape)) ** 0.5, rel=0.02)
    assert keys.std().item() == pytest.approx((3 * layer.d_key) ** -0.5, rel=0.02)
    assert layer.memory.values.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    for projection in (layer.gate_proj, layer.out_proj):
        assert projection.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_value_learning_rate_is_an_option():
    layer = MemoryPlus(16, value_lr_multiplier=2.5)
    (values,) = [group for group in layer.parameter_groups() if group.name == "values"]
    assert values.lr_multiplier == 2.5
    assert not values.weight_decay
    assert not values.schedule
