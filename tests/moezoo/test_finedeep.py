"""Finedeep: what it is with one expert, what it returns, and how it begins."""

import pytest
import torch

import moezoo
from moezoo import InputError

D = 32


def make(**arguments) -> moezoo.Finedeep:
    torch.manual_seed(0)
    layer = moezoo.Finedeep(D, 48, **arguments).double()
    with torch.no_grad():
        for sublayer in layer.sublayers:
            sublayer.norm.copy_(0.5 + torch.rand(D))
    return layer


def test_one_expert_that_is_half_weighed_is_a_dense_block_behind_a_norm():
    layer, x = make(num_sublayers=1, num_experts=1, bias=True), torch.randn(9, D).double()
    only = layer.sublayers[0]
    torch.nn.init.zeros_(only.router)
    torch.nn.init.normal_(only.down_bias)
    block = moezoo.DenseFFN(D, 48, bias=True).double()
    for name in ("gate_proj", "up_proj"):
        getattr(block, name).load_state_dict(getattr(only, name).state_dict())
    block.down_proj.weight.data.copy_(only.down_proj.weight)
    block.down_proj.bias.data.copy_(only.down_bias[0])
    normed = torch.nn.functional.rms_norm(x, (D,), only.norm, 1e-6)
    torch.testing.assert_close(2 * layer(x).hidden, block(normed).hidden, rtol=1e-12, atol=1e-12)


def test_it_returns_what_is_added_and_sub_layers_read_each_other():
    layer, x = make(num_sublayers=2, num_experts=4), torch.randn(9, D).double()
    first, second = layer.sublayers
    after = x + first(x)
    torch.testing.assert_close(layer(x).hidden, after + second(after) - x, rtol=1e-12, atol=1e-12)
    beside = first(x) + second(x)
    assert not torch.allclose(layer(x).hidden, beside, rtol=1e-2)


def test_an_expert_is_weighed_by_its_own_answer():
    layer, x = make(num_sublayers=1, num_experts=3), torch.randn(9, D).double()
    before, part = layer(x).hidden, layer.sublayers[0]
    own = slice(16, 32)  # of the second expert
    with torch.no_grad():
        part.down_proj.weight[:, own].mul_(-1)
        part.router[1].mul_(-1)
    normed = torch.nn.functional.rms_norm(x, (D,), part.norm, 1e-6)
    z = torch.nn.functional.silu(part.gate_proj(normed)) * part.up_proj(normed)
    answer = z[:, own] @ part.down_proj.weight[:, own].T
    # Its weight has stayed, and its answer has turned.
    weight = (answer @ part.router[1]).sigmoid()[:, None]
    expected = before + 2 * weight * answer
    torch.testing.assert_close(layer(x).hidden, expected, rtol=1e-12, atol=1e-12)


def test_it_begins_about_as_loud_as_a_dense_block():
    x = torch.randn(400, 128)
    torch.manual_seed(0)
    ratio = moezoo.Finedeep(128)(x).hidden.std() / moezoo.DenseFFN(128)(x).hidden.std()
    assert ratio.item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 5}, "d_ff: 48 is not divisible by num_sublayers . num_experts = 10"),
        ({"num_sublayers": 0}, "num_sublayers: 0 is out of range"),
        ({"activation": "mish"}, "activation: 'mish' is not known"),
        ({"norm_eps": -1.0}, "norm_eps: -1 is out of range"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)
