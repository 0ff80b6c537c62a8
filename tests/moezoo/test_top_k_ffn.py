"""Top-k activation: exact counts, both rankings, and the Gaussian threshold of Spark."""

import math

import pytest
import torch

from moezoo import DenseFFN, InputError, TopKFFN
from moezoo.layers import top_k_ffn
from moezoo_kernels.statistical_top_k.plain import excess

D = 16


def make(**arguments) -> TopKFFN:
    torch.manual_seed(0)
    return TopKFFN(D, **{"d_ff": 64, "top_k": 8, **arguments}).double().eval()


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def inner_of(layer: TopKFFN, hidden: torch.Tensor) -> torch.Tensor:
    """What enters the output projection."""
    caught = []
    hook = layer.down_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    layer(hidden)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", ["magnitude", "contribution"])
@pytest.mark.parametrize("top_k", [1, 8, 63, 64])
def test_exactly_k_neurons_answer(gated, rank, top_k):
    layer = make(activation="gelu", gated=gated, rank=rank, top_k=top_k)
    inner = inner_of(layer, tokens())
    assert ((inner != 0).sum(dim=-1) == top_k).all()
    assert layer(tokens()).stats["density"] == top_k / 64
    assert int(layer(tokens()).stats["expert_counts"].sum()) == 40 * top_k


def test_ties_do_not_keep_more_than_k():
    layer = make()
    with torch.no_grad():
        layer.up_proj.weight.copy_(layer.up_proj.weight[:1].expand(64, -1))
    positive = tokens() @ layer.up_proj.weight[0] > 0
    inner = inner_of(layer, tokens())
    assert ((inner != 0).sum(dim=-1) == 8 * positive).all()


def test_the_kept_are_the_strongest():
    hidden = tokens()
    for rank in ("magnitude", "contribution"):
        layer = make(rank=rank)
        with torch.no_grad():
            layer.down_proj.weight[:, ::2] *= 5
        a = (hidden @ layer.up_proj.weight.t()).relu()
        strength = a * layer.down_proj.weight.norm(dim=0) if rank == "contribution" else a
        for row, kept in zip(strength, inner_of(layer, hidden), strict=True):
            best = sorted(range(64), key=lambda j: -row[j])[:8]
            assert set(kept.nonzero().flatten().tolist()) == set(best)


@pytest.mark.parametrize("gated", [False, True])
def test_keeping_all_is_the_dense_block(gated):
    layer = make(top_k=64, gated=gated)
    dense = DenseFFN(D, 64, activation="relu", gated=gated).double()
    dense.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens()).hidden, dense(tokens()).hidden, rtol=1e-13, atol=0)


def test_neurons_that_do_not_answer_get_no_gradient():
    layer = make()
    hidden = tokens(1)
    layer(hidden).hidden.sum().backward()
    answered = (inner_of(layer, hidden) != 0)[0]
    assert answered.sum() == 8
    assert (layer.up_proj.weight.grad.any(dim=1) == answered).all()
    assert (layer.down_proj.weight.grad.any(dim=0) == answered).all()


@pytest.mark.parametrize(("d_ff", "density"), [(2048, 0.05), (9216, 0.08)])
def test_the_threshold_passes_about_k_gaussians(d_ff, density):
    top_k = round(density * d_ff)
    layer = TopKFFN(D, d_ff=d_ff, top_k=top_k, selection="statistical")
    u = torch.randn(300, d_ff, generator=torch.Generator().manual_seed(2)) * 3 + 1
    counts = (excess(u, layer.quantile) > 0).sum(dim=-1)
    sigma = (d_ff * density * (1 - density)) ** 0.5
    assert ((counts - top_k).abs() < 4 * sigma).all()
    assert (counts.double().mean() - top_k).abs() < 4 * sigma / 300**0.5
    assert counts.unique().numel() > 5  # a threshold, not a sort


def test_gradients_flow_through_mean_and_deviation():
    layer = make(selection="statistical")
    u = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    above = excess(u, layer.quantile).relu()
    above.sum().backward()
    active = above > 0
    centred = (u - u.mean(-1, keepdim=True)).detach()
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    of_threshold = (1 + layer.quantile * centred / deviation) / 64
    expected = active.double() - active.sum(-1, keepdim=True) * of_threshold
    torch.testing.assert_close(u.grad, expected, rtol=1e-10, atol=1e-12)
    assert (u.grad[~active] != 0).all()  # a threshold without a gradient would leave zeros
    assert torch.autograd.gradcheck(lambda u: excess(u, layer.quantile).relu(), (u,))


def test_a_constant_row_is_all_below_its_threshold():
    layer = make(selection="statistical")
    u = torch.full((2, 64), 0.3, dtype=torch.float64, requires_grad=True)
    above = excess(u, layer.quantile).relu()
    above.sum().backward()
    assert not above.any()
    assert u.grad.isfinite().all()


def test_spark_reads_two_halves_and_has_the_parameters_of_an_mlp():
    layer = make(selection="statistical", activation="gelu", gated=True, split_input=True)
    assert layer.cost().total_parameters == DenseFFN(D, 64, gated=False).cost().total_parameters
    hidden, other = tokens(), tokens()
    other[:, D // 2 :] = torch.randn(40, D // 2, dtype=torch.float64)
    first, second = (inner_of(layer, x) for x in (hidden, other))
    assert torch.equal(first != 0, second != 0)  # the gate decides, and reads the first half
    assert not torch.allclose(first, second)
    u = hidden[:, : D // 2] @ layer.gate_proj.weight.t()
    theta = u.mean(-1, keepdim=True) + u.std(-1, keepdim=True, unbiased=False) * layer.quantile
    up = hidden[:, D // 2 :] @ layer.up_proj.weight.t()
    expected = torch.nn.functional.gelu((u - theta).clamp(min=0)) * up
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-14)
    assert layer.quantile == pytest.approx(math.sqrt(2) * torch.erfinv(torch.tensor(0.75)).item())


def test_padding_stays_out_of_the_statistics():
    layer, mask = make(), torch.arange(40) < 25
    alone, beside = layer(tokens()[:25]).stats, layer(tokens(), mask=mask).stats
    assert torch.equal(alone["expert_counts"], beside["expert_counts"])
    assert alone["density"] == pytest.approx(beside["density"].item())
    assert "expert_counts" not in TopKFFN(8, d_ff=4097)(torch.randn(2, 8)).stats


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 65}, r"top_k: 65 is out of range"),
        ({"selection": "statistical", "top_k": 64}, r"top_k: 64 is all of d_ff"),
        ({"selection": "statistical", "rank": "contribution"}, r"rank: a threshold ranks nothing"),
        ({"split_input": True}, r"split_input: an MLP has nothing to split"),
        ({"selection": "gaussian"}, r"selection: 'gaussian' is not known"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("selection", ["exact", "statistical"])
def test_blocks_of_tokens_are_all_of_them(monkeypatch, selection, routed, masked):
    """Without gradients many tokens are run some at a time: outputs and statistics stay."""
    monkeypatch.setattr(top_k_ffn, "_BLOCK", 7)
    layer = make(selection=selection).eval()
    hidden = tokens(40).reshape(4, 10, -1)
    given = {}
    if routed:
        given["router_input"] = tokens(40).flip(0).reshape(hidden.shape)
    if masked:
        given["mask"] = torch.arange(40).reshape(4, 10) % 3 > 0
    expected = layer(hidden, **given)  # with gradients, in one piece
    with torch.no_grad():
        found, inferred = layer(hidden, **given), layer.infer(hidden, **given)
    assert not found.hidden.requires_grad
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inferred, found.hidden)
    assert found.stats.keys() == expected.stats.keys()
    for name, value in expected.stats.items():
        torch.testing.assert_close(found.stats[name], value)
