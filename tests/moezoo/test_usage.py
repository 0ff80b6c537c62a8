"""Usage of slots: planted loads with known figures, sums over batches, and the heat map."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import moezoo
from moezoo.analysis.heat_map import _averaged, _limit, _percent, draw_usage
from moezoo.analysis.usage import (
    Evenness,
    add_loads,
    collect_loads,
    layers_by_pool,
    routed_layers,
    usage_of,
)
from moezoo.routing import stats
from moezoo.routing.stats import (
    SlotLoad,
    kl_to_uniform,
    slot_load,
    slot_stats,
    slot_weight,
    used_weight,
)

D = 8


def always_one(layer: moezoo.FeedForward) -> moezoo.FeedForward:
    """Plant a router that knows one answer to a token of ones."""
    with torch.no_grad():
        if isinstance(layer, moezoo.SparseMoE):
            layer.gate.weight.copy_(torch.arange(layer.num_experts)[:, None].expand(-1, D))
        elif isinstance(layer, moezoo.HashLayer):
            layer.set_table(torch.full_like(layer.table[:, :-1], 2))
        elif isinstance(layer, moezoo.FastFeedForward):
            layer.tree.bias.fill_(1e3)
        elif isinstance(layer, moezoo.UltraFastFFF):
            layer.in_bias.fill_(-1e3)
    return layer.eval()


SWITCH = {"top_k": 1, "router": moezoo.RouterOptions(normalize=False)}
FEW = moezoo.CapacityOptions(factor=0.5, eval_factor=0.5)
ONE_SLOT = {
    "moe": lambda: moezoo.SparseMoE(D, num_experts=6, **SWITCH),
    "moe with room for few": lambda: moezoo.SparseMoE(D, num_experts=6, capacity=FEW, **SWITCH),
    "hash": lambda: moezoo.HashLayer(D, num_experts=5, vocab_size=20),
    "peer": lambda: moezoo.PEER(D, num_experts=16, num_heads=1, top_k=1, query_norm="none"),
    "memory": lambda: moezoo.ProductKeyMemory(D, num_keys=4, num_heads=1, top_k=1),
    "memory+": lambda: moezoo.MemoryPlus(D, num_keys=5, num_heads=1, top_k=1),
    "tree": lambda: moezoo.FastFeedForward(D, depth=3),
    "tree of neurons": lambda: moezoo.UltraFastFFF(D, depth=3),
}


@pytest.mark.parametrize("name", ONE_SLOT)
def test_a_router_that_knows_one_slot_is_as_uneven_as_can_be(name):
    torch.manual_seed(0)
    layer = always_one(ONE_SLOT[name]())
    hidden = torch.ones(2, 9, D)
    usage = usage_of(layer.slot_load(hidden, token_ids=torch.arange(18).reshape(2, 9)))
    n = usage.num_slots
    for evenness in usage.measures().values():
        assert evenness.usage == pytest.approx(1 / n, rel=1e-12)
        assert evenness.unevenness == pytest.approx(math.log(n), rel=1e-12)
        assert evenness.gini == pytest.approx(1 - 1 / n, rel=1e-12)
        assert (evenness.top50, evenness.top90, evenness.top99) == (1, 1, 1)
        assert evenness.max_violation == pytest.approx(n - 1, rel=1e-12)
        assert evenness.dead == n - 1


def test_an_even_router_is_even():
    layer = moezoo.HashLayer(D, num_experts=4, hash_function="random", key="position").eval()
    load = layer.slot_load(torch.randn(3, 8, D), token_ids=torch.zeros(3, 8, dtype=torch.int64))
    even = Evenness(1.0, 0.0, 0.0, 2, 4, 4, 0.0, 0)
    assert usage_of(load).measures() == {"weight": even, "choice": even}

    moe = moezoo.SparseMoE(D, num_experts=D, **SWITCH).eval()
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(D))
    load = moe.slot_load(torch.eye(D).repeat(3, 1) * 5)
    assert load.counts.tolist() == [3] * D
    usage = usage_of(load)
    assert usage.by_choice == Evenness(1.0, 0.0, 0.0, 4, 8, 8, 0.0, 0)
    assert usage.by_weight.unevenness == pytest.approx(0.0, abs=1e-12)


def test_figures_by_hand():
    load = SlotLoad(
        counts=torch.tensor([1, 1, 0, 2]), mass=torch.tensor([1.0, 3.0, 0.0, 0.0]),
        best=torch.tensor([0, 0, 0, 1]), kind="values", shape=(2, 2),
    )  # fmt: skip
    usage = usage_of(load)
    weight, choice, first = usage.measures().values()
    assert weight.usage == 0.5
    assert weight.unevenness == pytest.approx(0.25 * math.log(1) + 0.75 * math.log(3), rel=1e-12)
    differences = (load.mass[:, None] - load.mass).abs().sum().item()
    assert weight.gini == pytest.approx(differences / (2 * 4 * 4.0)) == 0.625
    assert (weight.top50, weight.top90, weight.dead) == (1, 2, 2)
    assert choice.usage == 0.75
    assert choice.max_violation == pytest.approx(1.0)
    assert first.dead == 3
    row = usage.as_row()
    assert (row["usage_w"], row["usage_u"], row["usage_first"]) == (0.5, 0.75, 0.25)
    assert (row["kind"], row["num_slots"]) == ("values", 4)


def test_weights_add_up_before_capacity_and_without_padding():
    torch.manual_seed(0)
    options = moezoo.CapacityOptions(factor=0.25, eval_factor=0.25)
    layer = moezoo.SparseMoE(D, num_experts=4, top_k=2, capacity=options).eval()
    hidden, mask = torch.randn(2, 20, D), torch.rand(2, 20) < 0.6
    load = layer.slot_load(hidden, mask=mask)
    assert int(layer(hidden, mask=mask).stats["dropped"]) > 0
    assert int(load.counts.sum()) == 2 * int(mask.sum())
    assert float(load.mass.sum()) == pytest.approx(int(mask.sum()), rel=1e-6)  # normalised
    hidden[~mask] = 1e3
    again = layer.slot_load(hidden, mask=mask)
    assert torch.equal(again.mass, load.mass)


def test_soft_leaves_weigh_what_their_probabilities_are():
    layer = moezoo.FastFeedForward(D, depth=2, hard=False).eval()
    hidden, mask = torch.randn(11, D), torch.arange(11) < 7
    load = layer.slot_load(hidden, mask=mask)
    right = layer.tree.logits(hidden[:7]).sigmoid()
    wanted = (1 - right[:, 0]) * right[:, 1]
    assert load.mass[1].item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    assert load.mass.sum().item() == pytest.approx(7, rel=1e-5)
    assert int(load.counts.sum()) == 7


def test_neurons_weigh_what_their_magnitudes_are():
    layer = moezoo.TopKFFN(D, d_ff=12, top_k=3, gated=False, activation="relu2").eval()
    hidden, mask = torch.randn(9, D), torch.arange(9) != 4
    inner = (hidden @ layer.up_proj.weight.T).relu().square() * mask[:, None]
    kept = inner * (inner >= inner.sort(dim=-1).values[:, -3:-2])
    load = layer.slot_load(hidden, mask=mask)
    torch.testing.assert_close(load.mass, kept.sum(dim=0))
    assert torch.equal(load.counts, (kept > 0).sum(dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masses_of_any_dtype_add_up_exactly(dtype):
    weights = torch.rand(500, 4).to(dtype)
    indices = torch.randint(7, (500, 4))
    mass = slot_weight(indices, weights, 7)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = torch.zeros(7, dtype=torch.float64)
    wanted.index_put_((indices,), weights.double(), accumulate=True)
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-6, atol=0)


def test_statistics_list_few_slots_and_summarise_many():
    indices = torch.tensor([[0, 1], [0, -1], [4, 4]])
    mask = torch.tensor([True, True, False])
    found = slot_stats(indices, None, 5, mask)
    assert {k: v.tolist() for k, v in found.items() if k != "unevenness"} == {
        "tokens": 2, "usage": pytest.approx(0.4), "expert_counts": [2, 1, 0, 0, 0],
    }  # fmt: skip
    assert "expert_counts" not in slot_stats(indices, None, 5, mask, most_counts=4)
    assert slot_load(indices, None, 5, mask, ranked=True).best.tolist() == [2, 0, 0, 0, 0]
    assert kl_to_uniform(torch.tensor([1.0, 1.0], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_of_few_slots_of_many_are_those_of_all(weighted, monkeypatch):
    """Those that nothing chose are left out; the figures stay."""
    indices = torch.randint(-1, 40, (50, 2)) * 25
    indices[indices < 0] = -1
    weights = torch.rand(50, 2, dtype=torch.float64) if weighted else None
    mask = torch.rand(50) < 0.7
    few = slot_stats(indices, weights, 1000, mask, most_counts=0)
    assert used_weight(indices, weights, 1000, mask).numel() <= 40
    monkeypatch.setattr(stats, "used_weight", slot_weight)
    every = slot_stats(indices, weights, 1000, mask, most_counts=0)
    assert few.keys() == every.keys()
    for name, value in every.items():
        assert few[name].dtype == value.dtype
        torch.testing.assert_close(few[name], value, rtol=1e-6, atol=1e-7)
    nothing = slot_stats(torch.full((3, 2), -1), None, 1000, most_counts=0)
    assert (nothing["usage"], nothing["unevenness"]) == (0, 0)


class Stack(nn.Module):
    """Layers in a row, as they may stand in anybody's model."""

    def __init__(self) -> None:
        super().__init__()
        with moezoo.shared_values():
            self.blocks = nn.ModuleList(
                [
                    moezoo.SparseMoE(D, num_experts=4, num_shared_experts=1),
                    moezoo.MemoryPlus(D, num_keys=6, top_k=2, value_pool="p"),
                    moezoo.DenseFFN(D),
                    moezoo.MemoryPlus(D, num_keys=6, top_k=2, value_pool="p"),
                    moezoo.PEER(D, num_experts=25, num_heads=2, top_k=3),
                ]
            )

    def forward(self, hidden, mask=None):
        for block in self.blocks:
            hidden = hidden + block(hidden, mask=mask).hidden
        return hidden


def test_sums_over_batches_equal_one_batch():
    torch.manual_seed(0)
    model = Stack().eval()
    layers = routed_layers(model)
    assert list(layers) == ["blocks.0", "blocks.1", "blocks.3", "blocks.4"]
    hidden, mask = torch.randn(6, 10, D), torch.rand(6, 10) < 0.8
    with torch.no_grad(), collect_loads(layers) as whole:
        model(hidden, mask)
    with torch.no_grad(), collect_loads(layers) as parts:
        for batch in range(0, 6, 2):
            model(hidden[batch : batch + 2], mask[batch : batch + 2])
    model(hidden)  # after the block nothing is collected any more
    for name, load in whole.items():
        assert torch.equal(parts[name].counts, load.counts), name
        torch.testing.assert_close(parts[name].mass, load.mass, rtol=1e-6, atol=0)
        assert parts[name].mass.dtype == torch.float64
    assert int(whole["blocks.4"].counts.sum()) == 6 * int(mask.sum())
    assert int(whole["blocks.4"].best.sum()) == 2 * int(mask.sum())

    assert layers_by_pool(layers) == [["blocks.1", "blocks.3"]]
    total = add_loads(whole["blocks.1"], whole["blocks.3"])
    assert int(total.counts.sum()) == 2 * int(whole["blocks.1"].counts.sum())
    assert total.shape == (6, 6)


def test_layers_in_training_are_refused():
    model = Stack().train()
    with (
        pytest.raises(moezoo.InputError, match=r"'blocks.0' is in training mode; call model.eval"),
        collect_loads(routed_layers(model)),
    ):
        pass


def load_of(mass: torch.Tensor, kind: str = "experts") -> SlotLoad:
    return SlotLoad((mass > 0).long().flatten(), mass.flatten(), None, kind, tuple(mass.shape))


def test_the_picture_shows_shares_and_who_is_dead():
    loads = {
        "layer 0": load_of(torch.tensor([1.0, 1.0, 2.0, 0.0])),
        "layer 1": load_of(torch.tensor([1.0, 1.0, 1.0, 1.0])),
        "layer 2": load_of(torch.rand(300, 300), "values"),
        "layer 3": load_of(torch.rand(1000), "neurons"),
    }
    figure = draw_usage(loads, "title")
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=50)
    assert buffer.getvalue().startswith(b"\x89PNG")
    rows, neurons, grid, scale = figure.axes
    drawn = rows.images[0].get_array()
    assert drawn.shape == (2, 4)
    assert drawn.mask.tolist() == [[False, False, False, True], [False] * 4]
    np.testing.assert_allclose(drawn.filled(9), [[0, 0, 1, 9], [0, 0, 0, 0]], atol=1e-12)
    assert [text.get_text() for text in rows.texts][:4] == ["1.00", "1.00", "2.00", "never"]
    (right,) = rows.child_axes
    written = [label.get_text() for label in right.get_yticklabels()]
    assert written == ["usage 75 %, KL 0.35 nats", "usage 100 %, KL 0.00 nats"]
    assert neurons.images[0].get_array().shape == (1, 250)
    assert grid.images[0].get_array().shape == (100, 100)
    assert grid.get_xlabel() == "second half-key (3 per cell)"
    assert grid.get_title().startswith("layer 2: 90,000 values\nusage ")
    assert "over an even share" in scale.get_xlabel()


@pytest.mark.parametrize("grids", [1, 2, 4])
def test_pictures_of_grids_alone(grids):
    loads = {f"layer {n}": load_of(torch.zeros(5, 5), "values") for n in range(grids)}
    figure = draw_usage(loads, "nothing was read")
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    assert len(figure.axes) == grids + 1
    assert all(axes.images[0].get_array().mask.all() for axes in figure.axes[:-1])


def test_cells_are_means_over_blocks():
    values = torch.arange(15.0).reshape(3, 5)
    np.testing.assert_allclose(_averaged(values, 3, 5), values)
    wanted = [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    np.testing.assert_allclose(_averaged(values, 2, 3), wanted)
    assert _limit([np.array([-np.inf, 0.1]), np.array([0.0])]) == 1
    assert _limit([np.array([9.0, -9.0])]) == 4
    assert (_percent(1.0), _percent(0.99999), _percent(0.016)) == ("100 %", "99.9 %", "1.6 %")
