"""Thresholds of dense blocks: quantiles, published keys, budgets by measured error."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import moezoo
from moezoo.convert import Block
from moezoo.convert.select import (
    Curves,
    Keys,
    allocate,
    calibrate,
    curves,
    error_curves,
    keys_of,
    read_share,
    threshold,
    uniform,
    work_share,
)
from moezoo.convert.select.keys import token_weights
from moezoo.selection import Shares

D, WIDTH = 19, 46


@pytest.fixture
def block():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

    return Block(draw(WIDTH, D) * 1.5, draw(WIDTH, D), draw(D, WIDTH))


@pytest.fixture
def x():
    """Inputs whose channels differ in size, none of them symmetric."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(300, D, generator=generator, dtype=torch.float64)
    return drawn * torch.linspace(0.2, 2, D, dtype=torch.float64) + 0.3


def values(kind):
    normal = torch.randn(4000, 25, generator=torch.Generator().manual_seed(2))
    return {
        "normal": normal,
        "shifted": normal + 0.7,
        "relu2": F.relu(normal).square(),
        "lognormal": normal.exp() - 1,
    }[kind]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("kind", ["normal", "shifted", "relu2", "lognormal"])
def test_the_share_above_a_threshold_is_as_asked_for_however_skewed(kind, share):
    drawn = values(kind)
    kept = drawn.abs() > threshold(drawn, torch.ones(25), share)
    possible = float((drawn != 0).float().mean())
    assert float(kept.float().mean()) == pytest.approx(min(share, possible), abs=1e-3)


def test_thresholds_are_a_quantile_over_the_key():
    drawn, key = values("normal"), torch.linspace(0.1, 3, 25)
    key[7] = 0.0
    found = threshold(drawn, key, 0.4)
    others = torch.arange(25) != 7
    torch.testing.assert_close((found * key)[others], (found * key)[0].expand(24))
    assert not (drawn[:, 7].abs() > found[7]).any()
    assert found.isfinite().all()
    assert not threshold(drawn, key, 1.0).any()


def test_a_checkpoints_dtype_is_the_one_that_is_calibrated_in(block, x):
    keys = keys_of("teal", block, x)
    wide, narrow = (
        calibrate(block, x, keys, Shares(0.5, 1.0, 0.5, 0.5), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(narrow.input, narrow.input.bfloat16().float())
    assert not torch.equal(wide.input, wide.input.bfloat16().float())


def test_shares_are_those_of_the_budget_each_after_the_ones_before(block, x):
    budget = Shares(0.7, 0.6, 0.8, 0.35)
    block32 = block.to(torch.float32)
    found = calibrate(block32, x.float(), keys_of("mix", block32, x.float()), budget)
    assert found.shares == pytest.approx(budget, abs=3e-3)
    inputs = x.float() * (x.float().abs() > found.input)
    gate = F.silu(inputs @ block32.gate.t())
    assert float((gate.abs() > found.gate).float().mean()) == pytest.approx(0.6, abs=3e-3)


def test_the_layer_computes_what_was_calibrated(block, x):
    block32, x = block.to(torch.float32), x.float()
    found = calibrate(block32, x, keys_of("mix", block32, x), Shares(0.7, 0.6, 0.8, 0.35))
    layer = moezoo.SelectiveFFN(D, WIDTH).eval()
    for name in ("gate", "up", "down"):
        getattr(layer, f"{name}_proj").weight.data = getattr(block32, name)
    for name in Shares._fields:
        getattr(layer.selector, name).copy_(getattr(found, name))
    layer.selector.shares.copy_(torch.tensor(found.shares))
    positions = torch.arange(60).expand(5, 60)
    output = layer(x.view(5, 60, D), positions=positions)
    expected = found.run(block32, x, positions.reshape(-1) == 0)
    torch.testing.assert_close(output.hidden.detach().view(-1, D), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, block32.run(x), atol=1e-2)
    dense = block32.run(x)[::60]
    torch.testing.assert_close(expected[::60], dense, rtol=1e-5, atol=1e-6)
    cost = layer.cost()
    assert cost.active_parameters == pytest.approx(
        cost.total_parameters * work_share(found.shares), abs=1
    )


def test_published_keys(block, x):
    up = x @ block.up.t()
    gate = F.silu(x @ block.gate.t())
    wina, chess = keys_of("wina", block, x), keys_of("chess", block, x)
    torch.testing.assert_close(wina.input, block.gate.square().sum(0).sqrt())
    torch.testing.assert_close(wina.hidden, block.down.square().sum(0).sqrt())
    # CHESS, eq. 8: of all thresholds that drop as many gates these have the least mean square
    # error of act(gate) * up, if the two are independent.
    torch.testing.assert_close(chess.gate, up.square().mean(0).sqrt())
    assert all(torch.equal(key, torch.ones_like(key)) for key in keys_of("cats", block, x))
    assert torch.equal(chess.hidden, torch.ones(WIDTH, dtype=torch.float64))
    mix = keys_of("mix", block, x)
    share = token_weights(block.run(x))
    share = share / share.sum()
    columns = block.up * ((share @ gate.square()).sqrt() * block.down.norm(dim=0))[:, None]
    torch.testing.assert_close(mix.up_input, columns.norm(dim=0))


def test_the_key_of_an_input_is_the_error_that_dropping_it_leaves(block, x):
    """To first order, for hidden values that are independent of each other."""
    key = keys_of("mix", block, x).input
    small = 1e-4
    for j in (0, 11):
        moved = x.clone()
        moved[:, j] += small
        change = F.silu(moved @ block.gate.t()) - F.silu(x @ block.gate.t())
        change = change * (x @ block.up.t()) * block.down.norm(dim=0)
        share = token_weights(block.run(x))
        left = (change.square().sum(-1) @ share / share.sum()).sqrt() / small
        assert float(left) == pytest.approx(float(key[j]), rel=1e-3)


@pytest.mark.parametrize("name", ["input", "up_input", "hidden"])
def test_measured_errors_are_those_of_the_block(name, block, x):
    keys = keys_of("mix", block, x)
    found = error_curves(block, x, keys)
    half = curves.GRID.index(0.5)
    budget = Shares(**{name: 0.5})
    thresholds = calibrate(block, x, keys, budget)
    change = thresholds.run(block, x, torch.zeros(len(x), dtype=torch.bool)) - block.run(x)
    square = block.run(x).square().sum(-1)
    error = float((change.square().sum(-1) / (square + square.median())).mean())
    measured = {
        "input": found.input[half],
        "up_input": found.up_input[half],
        "hidden": found.neurons[0, half],
    }[name]
    # Neurons' errors are added up over every second token.
    assert float(measured) == pytest.approx(error, rel=0.1 if name == "hidden" else 1e-2)
    assert found.input[0] == found.up_input[0] == found.neurons[0, 0] == 0
    assert (found.input.diff() >= 0).all()


def test_work_and_read_count_what_is_left():
    kept = Shares(input=0.5, gate=0.4, up_input=0.25, hidden=0.3)
    assert work_share(kept) == pytest.approx((0.5 + 0.4 * 0.25 + 0.3) / 3)
    assert read_share(kept) == pytest.approx((0.5 + 0.4 + 0.3) / 3)
    assert read_share(kept._replace(gate=1.0)) == pytest.approx((0.5 + 0.25 + 0.3) / 3)
    for method, share in itertools.product(("cats", "chess", "teal", "wina"), (0.4, 0.8)):
        assert work_share(uniform(method, share)) == pytest.approx(share)
    with pytest.raises(moezoo.InputError, match=r"work: cats computes the whole gate"):
        uniform("cats", 0.34)


@pytest.fixture
def coarse(monkeypatch):
    grid = (1.0, 0.6, 0.3)
    for module in (curves, __import__("moezoo.convert.select.allocate", fromlist=["GRID"])):
        monkeypatch.setattr(module, "GRID", grid)
    return grid


@pytest.mark.parametrize("count", ["work", "read"])
def test_no_cheaper_choice_has_less_error(coarse, count):
    generator = torch.Generator().manual_seed(3)

    def curve():
        draw = torch.rand(3, generator=generator, dtype=torch.float64).cumsum(0)
        return draw - draw[0]

    found = []
    for _ in range(2):
        gates, hidden = curve(), curve()
        neurons = torch.maximum(gates[:, None], hidden[None, :])
        neurons[1, 0] = neurons[2, 0] = neurons[2, 1] = torch.inf
        found.append(Curves(curve(), curve(), neurons))
    weights = [1.0, 3.0]
    counted = {"work": work_share, "read": read_share}[count]
    chosen = allocate(found, weights, 0.6, count)

    def error(kept, curve):
        i, g, u, h = (coarse.index(share) for share in kept)
        return float(curve.input[i] + curve.up_input[u] + curve.neurons[g, h])

    def total(choice):
        amount = sum(counted(kept) for kept in choice) / 2
        return amount, sum(w * error(k, c) for w, k, c in zip(weights, choice, found, strict=True))

    amount, least = total(chosen)
    assert amount <= 0.6
    every = [Shares(*each) for each in itertools.product(coarse, repeat=4)]
    for choice in itertools.product(every, repeat=2):
        other_amount, other = total(choice)
        assert other_amount > amount + 1e-12 or other >= least - 1e-12, choice


def test_a_layer_that_costs_more_keeps_more(block, x):
    measured = error_curves(block, x, keys_of("mix", block, x))
    for share in (0.75, 0.5):
        cheap, dear = allocate([measured, measured], [1.0, 30.0], share)
        assert work_share(cheap) < share < work_share(dear)
        assert work_share(cheap) + work_share(dear) <= 2 * share
    with pytest.raises(moezoo.InputError, match=r"work: 0\.1 is out of range for mix"):
        allocate([measured], [1.0], 0.1)


def test_a_token_that_is_not_finite_is_seen():
    layer = moezoo.SelectiveFFN(D, WIDTH, selection=moezoo.Thresholds(input=0.5, gate=0.1))
    hidden = torch.randn(3, D)
    hidden[1, 4] = torch.nan
    output = layer(hidden).hidden
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()


def test_thresholds_stay_in_fp32():
    layer = moezoo.SelectiveFFN(D, WIDTH, selection=moezoo.Thresholds(input=0.1234567))
    layer.to(torch.bfloat16)
    assert layer.up_proj.weight.dtype == torch.bfloat16
    assert {b.dtype for b in layer.selector.buffers()} == {torch.float32}
    assert torch.equal(layer.selector.input, torch.full((D,), 0.1234567))


def test_zero_thresholds_are_the_dense_block():
    layer, dense = moezoo.SelectiveFFN(D, WIDTH), moezoo.DenseFFN(D, WIDTH)
    dense.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if not k.startswith("selector.")}
    )
    hidden = torch.randn(9, D)
    assert torch.equal(layer(hidden).hidden, dense(hidden).hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": {"kind": "thresholds"}}, "selection.kind: 'thresholds' is not known; did"),
        ({"selection": {"gait": 0.1}}, "selection: unknown option 'gait'; did you mean 'gate'"),
        ({"selection": {"gate": -1.0}}, "selection.gate: -1 is out of range"),
        ({"selection": {"gate": 0.1}, "gated": False}, "selection.gate: an MLP has no gate"),
        ({"first_tokens": -1}, "first_tokens: -1 is out of range"),
    ],
)
def test_mistakes_are_named(options, message):
    config = {"class_path": "moezoo.SelectiveFFN", "init_args": {"d_model": D, **options}}
    with pytest.raises(moezoo.InputError, match=message):
        moezoo.SelectiveFFN.from_config(config)


def test_positions_of_another_shape_are_refused():
    with pytest.raises(moezoo.InputError, match=r"positions: shape \(4,\) does not match"):
        moezoo.SelectiveFFN(D)(torch.randn(3, D), positions=torch.arange(4))


def test_keys_name_what_is_kept():
    assert Keys._fields == Shares._fields


def test_a_token_with_a_huge_output_does_not_decide_for_all(block, x):
    outlier = x.clone()
    outlier[17] *= 1e4
    for name in ("gate", "up_input", "input"):
        usual, found = (getattr(keys_of("mix", block, each), name) for each in (x, outlier))
        assert float((found / usual - 1).abs().max()) < 0.5
    usual, found = (error_curves(block, each, keys_of("mix", block, x)) for each in (x, outlier))
    torch.testing.assert_close(found.up_input, usual.up_input, rtol=0.3, atol=1e-3)
