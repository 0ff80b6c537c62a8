"""Product keys against all n² keys; query norms against torch's; usage against its definition."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo import InputError
from moezoo.random_routing import RandomRouting
from moezoo.routing.product_key import ProductKeys
from moezoo.routing.query_network import QUERY_NORMS, QueryNetwork
from moezoo.routing.stats import gini, kl_to_uniform, slot_usage, slot_weight, slots_holding, usage

REAL = (5, 11)  # real tokens per rank, of 12


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_keys", "top_k"), [(1, 1), (17, 1), (17, 17), (32, 5)])
def test_retrieval_equals_brute_force_over_all_keys(share_keys, normalize, num_keys, top_k):
    keys = ProductKeys(
        10, num_keys, num_heads=3, top_k=top_k, share_keys=share_keys, normalize=normalize
    ).double()
    queries = torch.randn(1000, 3, 10, dtype=torch.float64)
    scores, slots = keys(queries)
    every_score, every_slot = keys.reference(queries)
    assert torch.equal(slots, every_slot)
    torch.testing.assert_close(scores, every_score, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    num_keys=st.integers(1, 12),
    share_keys=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_scores_are_exact_in_fp32_even_with_ties(num_keys, share_keys, seed, data):
    top_k = data.draw(st.integers(1, num_keys))
    torch.manual_seed(seed)
    keys = ProductKeys(4, num_keys, num_heads=2, top_k=top_k, share_keys=share_keys)
    with torch.no_grad():  # small integers: many sums tie, and none is rounded
        keys.keys.copy_(torch.randint(-2, 3, keys.keys.shape))
    queries = torch.randint(-2, 3, (9, 2, 4)).float()
    scores, slots = keys(queries)
    first, second = (slots // num_keys, slots % num_keys)
    books = keys.keys.expand(2, -1, -1, -1)
    for t in range(9):
        for h in range(2):
            sums = (books[h, 0] @ queries[t, h, :2])[:, None] + books[h, 1] @ queries[t, h, 2:]
            assert torch.equal(scores[t, h], sums.flatten().sort(descending=True).values[:top_k])
            assert torch.equal(sums[first[t, h], second[t, h]], scores[t, h])
            assert len(set(slots[t, h].tolist())) == top_k


def test_keys_and_slots_are_permuted_together():
    keys = ProductKeys(8, 6, num_heads=2, top_k=4).double()
    queries = torch.randn(50, 2, 8, dtype=torch.float64)
    _, slots = keys(queries)
    rows, columns = torch.randperm(6), torch.randperm(6)
    permuted = copy.deepcopy(keys)
    with torch.no_grad():
        permuted.keys[:, 0, rows] = keys.keys[:, 0]
        permuted.keys[:, 1, columns] = keys.keys[:, 1]
    _, moved = permuted(queries)
    assert torch.equal(moved, rows[slots // 6] * 6 + columns[slots % 6])


def test_mistakes_are_named():
    with pytest.raises(InputError, match="top_k: 9 is more than num_keys=8"):
        ProductKeys(8, 8, num_heads=2, top_k=9)
    with pytest.raises(InputError, match="d_key: 7 is odd"):
        ProductKeys(7, 8, num_heads=2, top_k=4)
    with pytest.raises(InputError, match=r"norm: 'bach' is not known; did you mean 'batch'\?"):
        QueryNetwork(8, 2, 4, norm="bach")


@pytest.mark.parametrize("norm", QUERY_NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("tokens", "masked"), [(40, False), (40, True), (1, False), (0, False)])
def test_queries_equal_torchs_norms(norm, training, tokens, masked):
    query = QueryNetwork(12, 3, 8, norm=norm, bias=True).double().train(training)
    for parameter in query.parameters():
        torch.nn.init.normal_(parameter)
    if norm == "batch":
        torch.nn.init.normal_(query.running_mean)
        torch.nn.init.uniform_(query.running_var, 0.5, 2.0)
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(tokens) < 0.6 if masked else None
    real = slice(None) if mask is None else mask
    direction = torch.randn(tokens, 3, 8, dtype=torch.float64)
    results = []
    for call in (query, query.reference):
        queries = call(x, mask)[real]
        wanted = [x, *query.parameters()]
        grads = torch.autograd.grad(queries, wanted, direction[real])
        results.append([queries, *grads])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_batch_norm_equals_torchs_module_over_a_run():
    query = QueryNetwork(6, 2, 4, norm="batch").double()
    module = torch.nn.BatchNorm1d(8).double()
    for _ in range(5):
        x = torch.randn(10, 6, dtype=torch.float64) * 3 + 1
        padded = torch.cat([x, torch.full((4, 6), 1e6, dtype=torch.float64)])
        mask = torch.arange(14) < 10
        expected = module(query.proj(x)).reshape(10, 2, 4)
        torch.testing.assert_close(query(padded, mask)[:10], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(query.running_mean, module.running_mean)
    torch.testing.assert_close(query.running_var, module.running_var)
    expected = module.eval()(query.proj(x)).reshape(10, 2, 4)
    torch.testing.assert_close(query.eval()(x), expected)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("tokens", [2, 63])
def test_the_norm_in_one_pass_equals_the_one_that_looks_at_the_mask(tokens, deferred):
    torch.manual_seed(4)
    x = torch.randn(tokens, 6, dtype=torch.float64) * 3 + 1
    direction = torch.randn(tokens, 2, 4, dtype=torch.float64)
    found = []
    for mask in (None, torch.ones(tokens, dtype=torch.bool)):
        torch.manual_seed(5)
        query = QueryNetwork(6, 2, 4, norm="batch").double()
        for parameter in query.parameters():
            torch.nn.init.normal_(parameter)
        if deferred:
            query.defer_state()
        stats = {}
        hidden = x.clone().requires_grad_()
        queries = query(hidden, mask, stats)
        grads = torch.autograd.grad(queries, [hidden, *query.parameters()], direction)
        if deferred:
            assert len(stats) == 3
            query.observe(stats)
            query.step()
        assert not torch.equal(query.running_mean, torch.zeros(8, dtype=torch.float64))
        found.append([queries, *grads, query.running_mean, query.running_var])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_one_token_leaves_the_running_averages_alone():
    query = QueryNetwork(6, 2, 4, norm="batch")
    before = copy.deepcopy(query.state_dict())
    for tokens in (0, 1):
        assert query(torch.randn(tokens, 6)).isfinite().all()
    assert all(torch.equal(before[k], v) for k, v in query.state_dict().items())


def memories() -> list:
    """Layers with a batch norm of queries, one alone and one inside an ablation."""
    peer = moezoo.PEER(12, num_experts=64, num_heads=2, top_k=3)
    memory = moezoo.ProductKeyMemory(12, num_keys=8, num_heads=2, top_k=3)
    return [peer, memory, RandomRouting(copy.deepcopy(memory))]


def averages(layer) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


@pytest.mark.parametrize("number", range(3))
def test_deferred_averages_follow_observe_and_step_alone(number):
    """And are then to the bit those of a layer that moves them in its forward pass."""
    at_once, deferred = memories()[number], memories()[number]
    deferred.load_state_dict(at_once.state_dict())
    deferred.defer_state()
    for step in range(3):
        before = averages(deferred)
        stats = []
        for micro in range(2):
            hidden = torch.randn(3, 5, 12)
            for layer in (at_once, deferred):
                torch.manual_seed(micro)  # of the ablation's noise
                stats.append(layer(hidden).stats)
        assert all(map(torch.equal, before, averages(deferred)))
        if step == 1:  # of which nothing is to be left
            deferred.observe(stats[1])
            deferred.discard()
            deferred.step()
            assert all(map(torch.equal, before, averages(deferred)))
        for layer, seen in ((at_once, stats[::2]), (deferred, stats[1::2])):
            layer.observe(seen[0])
            layer.observe(seen[1])
            assert layer is at_once or all(map(torch.equal, before, averages(layer)))
            layer.step()
        assert all(map(torch.equal, averages(at_once), averages(deferred)))
        assert not any(map(torch.equal, before, averages(deferred)))
    before = averages(deferred)
    deferred.eval().observe(deferred(torch.randn(3, 5, 12)).stats)
    deferred.step()
    assert all(map(torch.equal, before, averages(deferred)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_pass_moves_the_averages_once(reentrant):
    plain, recomputed = QueryNetwork(6, 2, 4, norm="batch"), QueryNetwork(6, 2, 4, norm="batch")
    recomputed.load_state_dict(plain.state_dict())
    for _ in range(8):
        hidden = (torch.randn(10, 6) * 2 + 1).requires_grad_()
        plain(hidden).sum().backward()
        checkpoint(recomputed, hidden, use_reentrant=reentrant).sum().backward()
    assert all(map(torch.equal, plain.buffers(), recomputed.buffers()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_averages_alone(bad):
    query = QueryNetwork(6, 2, 4, norm="batch")
    query(torch.randn(10, 6))
    before = averages(query)
    hidden = torch.randn(10, 6)
    hidden[3, 2] = bad
    query(hidden)
    assert all(map(torch.equal, before, query.buffers()))
    query(torch.randn(10, 6))
    assert not any(map(torch.equal, before, query.buffers()))


def test_running_averages_stay_fp32_in_a_bf16_model():
    query = QueryNetwork(6, 2, 4, norm="batch")
    query(torch.randn(20, 6))
    mean = query.running_mean.clone()
    query.to(torch.bfloat16)
    assert query.proj.weight.dtype == torch.bfloat16
    assert torch.equal(query.running_mean, mean)
    assert query(torch.randn(20, 6, dtype=torch.bfloat16)).dtype == torch.float32


def test_qk_norm_ignores_the_scale_of_input_and_keys():
    query, keys = (
        QueryNetwork(6, 2, 4, norm="qk").double(),
        ProductKeys(4, 8, num_heads=2, top_k=3, normalize=True),
    )
    keys.double()
    x = torch.randn(30, 6, dtype=torch.float64) * 100
    scores, slots = keys(query(x))
    keys.keys.data *= 7
    again, same = keys(query(10 * x))
    assert torch.equal(slots, same)
    torch.testing.assert_close(scores, again, rtol=1e-4, atol=1e-4)
    assert scores.abs().max() <= math.sqrt(4) + 1e-9  # Cauchy-Schwarz: sqrt(d_key) times 1


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden, direction = (torch.randn(24, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    position = torch.arange(12)
    return hidden, direction, torch.cat([position < REAL[0], position < REAL[1]])


def seeded_network() -> QueryNetwork:
    torch.manual_seed(0)
    return QueryNetwork(6, 2, 3, norm="batch").double()


def run_rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    query = seeded_network()
    hidden, direction, mask = (x[12 * rank : 12 * rank + 12] for x in batch())
    ((query(hidden, mask).flatten(1) * direction)[mask]).sum().backward()
    gradient = query.proj.weight.grad
    dist.all_reduce(gradient)
    if rank == 0:
        state = {"gradient": gradient, "mean": query.running_mean, "var": query.running_var}
        torch.save(state, path + ".result")
    dist.barrier()  # whoever leaves first may abort the other
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_statistics_are_those_of_all_ranks(server, tmp_path: Path):
    path = str(tmp_path / "rendezvous")
    server.call_ranks(2, run_rank, path, folder=tmp_path)
    two = torch.load(path + ".result", weights_only=True)
    query = seeded_network()
    hidden, direction, mask = batch()
    ((query(hidden, mask).flatten(1) * direction)[mask]).sum().backward()
    torch.testing.assert_close(two["gradient"], query.proj.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(two["mean"], query.running_mean, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(two["var"], query.running_var, rtol=1e-12, atol=1e-15)


def test_usage_statistics_follow_their_definitions():
    indices = torch.tensor([[0, 1], [1, 3], [2, -1]])
    weights = torch.tensor([[0.5, 0.25], [0.75, 1.0], [2.0, 9.0]])
    mask = torch.tensor([True, True, False])
    mass = slot_weight(indices, weights, 5, mask)
    assert mass.tolist() == [0.5, 1.0, 0.0, 1.0, 0.0]
    assert slot_weight(indices, None, 5).tolist() == [1.0, 2.0, 1.0, 1.0, 0.0]
    share = torch.tensor([0.2, 0.4, 0.4])
    summary = slot_usage(mass)
    assert usage(mass) == pytest.approx(3 / 5)
    assert kl_to_uniform(mass).item() == pytest.approx(math.log(5) + (share * share.log()).sum())
    pairs = (mass[:, None] - mass).abs().sum() / (2 * 5 * mass.sum())
    assert gini(mass).item() == pytest.approx(pairs.item())
    assert [int(slots_holding(mass, p)) for p in (0.4, 0.5, 0.8, 0.9, 1.0)] == [1, 2, 2, 3, 3]
    assert set(summary) == {"usage", "unevenness", "gini", "top50", "top90", "top99"}


def test_usage_statistics_at_their_limits():
    one_slot = torch.zeros(1000).index_fill(0, torch.tensor(7), 3.0)
    assert kl_to_uniform(one_slot).item() == pytest.approx(math.log(1000), rel=1e-6)
    assert gini(one_slot).item() == pytest.approx(1 - 1 / 1000)
    even = torch.full((1000,), 0.3)
    assert kl_to_uniform(even).item() == pytest.approx(0.0, abs=1e-5)
    assert gini(even).item() == pytest.approx(0.0, abs=1e-6)
    assert [int(slot_usage(even)[f"top{p}"]) for p in (50, 90, 99)] == [500, 900, 990]
    assert all(v == 0 for v in slot_usage(torch.zeros(10)).values())
