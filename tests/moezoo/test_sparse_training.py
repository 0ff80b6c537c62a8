"""Dense blocks that train to be sparse: dReLU, and an L1 loss on hidden activations."""

import pytest
import torch

import moezoo
from moezoo import InputError
from moezoo.feed_forward import FeedForward

D, F = 96, 512


def block(**arguments) -> moezoo.DenseFFN:
    torch.manual_seed(0)
    return moezoo.DenseFFN(D, F, activation="relu", **arguments)


def test_drelu_is_zero_where_either_factor_is_not_positive():
    layer, x = block(activation_up="relu"), torch.randn(200, D)
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    hidden = layer.inner(x)
    assert torch.equal(hidden > 0, (gate > 0) & (up > 0))
    assert (hidden > 0).float().mean().item() == pytest.approx(0.25, abs=0.02)  # and not a half
    assert layer(x).stats["density"] == pytest.approx((hidden > 0).float().mean().item())


def test_drelu_begins_as_loud_as_reglu():
    """Half of the mean square of h is cut off, which a larger W_down makes up for."""
    x = torch.randn(400, D)
    drelu, reglu = block(activation_up="relu"), block()
    squares = drelu.inner(x).square().mean() / reglu.inner(x).square().mean()
    assert squares.item() == pytest.approx(0.5, abs=0.05)
    ratio = drelu.down_proj.weight.std() / reglu.down_proj.weight.std()
    assert ratio.item() == pytest.approx(2**0.5, rel=1e-3)


def test_l1_is_a_sum_over_neurons_and_a_mean_over_real_tokens():
    layer, x = block(l1=3e-4), torch.randn(2, 7, D)
    mask = torch.rand(2, 7) < 0.6
    hidden = layer.inner(x)
    expected = 3e-4 * hidden[mask].abs().sum().item() / int(mask.sum())
    assert layer(x, mask=mask).losses["l1"].item() == pytest.approx(expected, rel=1e-5)
    twice = moezoo.DenseFFN(D, 2 * F, activation="relu", l1=3e-4)
    for name in ("gate_proj", "up_proj"):
        weight = getattr(layer, name).weight
        getattr(twice, name).weight.data.copy_(torch.cat([weight, weight]))
    doubled = twice(x, mask=mask).losses["l1"].item()
    assert doubled == pytest.approx(2 * expected, rel=1e-5)


def test_l1_silences_neurons_and_their_death_is_seen():
    layer, x = block(l1=0.1), torch.randn(256, D)
    before = layer(x).stats
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).losses["l1"].backward()
        optimizer.step()
    after = layer(x).stats
    assert after["density"] < 0.8 * before["density"]
    with torch.no_grad():
        layer.gate_proj.weight[:40] = 0.0
    found = layer(x).stats
    assert found["usage"] <= 1 - 40 / F
    assert not found["expert_counts"][:40].any()
    assert block()(x).stats == {}


def test_the_loss_warms_up_with_steps_that_are_taken():
    layer, x = block(l1=0.3, l1_warmup=3), torch.randn(9, D)
    whole = block(l1=0.3)(x).losses["l1"].item()
    shares = []
    for taken in (True, False, True, True, True):
        shares.append(layer(x).losses["l1"].item() / whole)
        layer.observe(layer(x).stats)
        layer.step() if taken else layer.discard()
    assert shares == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1, 1])
    again = FeedForward.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    assert again(x).losses["l1"].item() == layer(x).losses["l1"].item()
    assert "l1_step" not in block(l1=0.3).state_dict()


def test_some_neurons_of_a_block_are_a_block():
    layer, x = block(activation_up="relu", bias=True), torch.randn(5, D)
    kept = torch.tensor([3, 100, 7])
    small = layer.take(kept)
    hidden = layer.inner(x)
    expected = hidden[:, kept] @ layer.down_proj.weight[:, kept].t() + layer.down_proj.bias
    assert torch.allclose(small(x).hidden, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation_up": "silu"}, "activation_up: 'silu' is not known"),
        ({"activation_up": "relu", "gated": False}, "activation_up: an MLP has one factor"),
        (
            {"activation_up": "relu", "glu": moezoo.GLUOptions(limit=1.0)},
            "activation_up: it ",
        ),
        ({"l1": -1.0}, "l1: -1 is out of range"),
        ({"l1_warmup": 10}, "l1_warmup: there is no l1"),
        ({"l1": 0.1, "l1_warmup": -1}, "l1_warmup: -1 is out of range"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        block(**arguments)
