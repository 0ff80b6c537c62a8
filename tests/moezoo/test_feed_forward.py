"""The layer API itself: building from configurations, choosing layers, saying what is wrong."""

import pytest
import torch

import moezoo
from moezoo import InputError, select_layers
from moezoo.feed_forward import FeedForward
from moezoo_kernels.activations import ACTIVATIONS


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every 2", [1, 3, 5]),
        ("3", [3]),  # as a command line gives it
        ("-1", [5]),
        ("every 4", [3]),
        ("every 9", []),
        (3, [3]),
        ([3, 1, 1], [1, 3]),
        ([-1], [5]),
        ([], []),
    ],
)
def test_select_layers(rule, expected):
    assert select_layers(rule, 6) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("every", "layers: 'every' is not understood; write all, every 2, or"),
        ("every 0", "'every 0' is not understood"),
        ("some", "'some' is not understood"),
        ([6], "there is no layer 6; the model has 6"),
        ([-7], "there is no layer -7"),
        (["1"], "'1' is not a layer number"),
        ([True], "True is not a layer number"),
    ],
)
def test_select_layers_says_what_is_wrong(rule, message):
    with pytest.raises(InputError, match="layers: ") as error:
        select_layers(rule, 6)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("moezoo.SparseMeo", "no layer 'moezoo.SparseMeo'; did you mean 'moezoo.SparseMoE'?"),
        ("os.system", "no layer 'os.system'"),
        ({"init_args": {}}, "has no class_path"),
        (
            {"class_path": "moezoo.DenseFFN", "args": {}},
            "unknown key 'args'; did you mean 'init_args'",
        ),
        ({"class_path": "moezoo.DenseFFN", "init_args": {"dff": 3}}, "did you mean 'd_ff'?"),
    ],
)
def test_from_config_says_what_is_wrong(config, message):
    with pytest.raises(InputError) as error:
        FeedForward.from_config(config, d_model=8)
    assert message in str(error.value)


def test_missing_argument_is_named():
    with pytest.raises(InputError, match="DenseFFN: argument 'd_model' is missing"):
        FeedForward.from_config("moezoo.DenseFFN")


def test_printing_a_layer_shows_its_configuration():
    assert "top_k=2" in repr(moezoo.SparseMoE(8))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_equals_its_reference(activation, gated, bias):
    torch.manual_seed(0)
    layer = moezoo.DenseFFN(7, 13, activation=activation, gated=gated, bias=bias).double()
    if bias:
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    hidden = torch.randn(3, 5, 7, dtype=torch.float64)
    fast = layer(hidden).hidden
    slow = layer.reference(hidden).hidden
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(fast)
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(fast, parameters, direction),
        torch.autograd.grad(slow, parameters, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
