"""A few tokens without gradients go through the kernel, and statistics are found when read."""

import pytest
import torch

import moezoo
from moezoo.layers import selective_ffn
from moezoo.selection import Thresholds
from moezoo_kernels import native

EVERY = {"input": 0.5, "gate": 0.02, "up_input": 0.3, "hidden": 0.01}


@pytest.fixture
def calls(monkeypatch):
    """Count the kernel's calls; skip the test where there is none."""
    if reason := native.unusable(torch.device("cpu"), torch.float32):
        pytest.skip(f"C++ kernels: {reason}")
    found, original = [], selective_ffn.selective_mlp

    def counted(*arguments, **options):
        found.append(len(arguments[0]))
        return original(*arguments, **options)

    monkeypatch.setattr(selective_ffn, "selective_mlp", counted)
    return found


def layer_of(gated=True, dtype=torch.float32, **more):
    torch.manual_seed(0)
    names = EVERY if gated else ("input", "hidden")
    selection = Thresholds(**{name: EVERY[name] for name in names}, **more)
    activation = "silu" if gated else "gelu"
    layer = moezoo.SelectiveFFN(
        17, 29, activation=activation, gated=gated, bias=True, selection=selection
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return layer.to(dtype).eval()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_few_tokens_go_through_the_kernel(calls, gated, tokens):
    layer, x = layer_of(gated), torch.randn(1, tokens, 17)
    positions = torch.arange(tokens)[None]
    for context in ({}, {"positions": positions}):
        expected = layer.reference(x, **context)
        before = layer(x, **context)  # with gradients: by torch's operators
        assert not calls
        with torch.no_grad():
            called, inferred = layer(x, **context), layer.infer(x, **context)
        assert calls == [tokens, tokens]
        for found in (called.hidden, inferred):
            torch.testing.assert_close(found, expected.hidden, rtol=1e-5, atol=1e-5)
        assert dict(called.stats).keys() == dict(before.stats).keys()
        for name, value in called.stats.items():
            torch.testing.assert_close(value, expected.stats[name])
            assert torch.equal(value, before.stats[name])
        calls.clear()


def test_what_the_kernel_does_not_know_is_left_to_torch(calls):
    x = torch.randn(17, 17)
    adapted = layer_of()
    adapted.up_proj = torch.nn.Sequential(adapted.up_proj)
    with torch.no_grad():
        layer_of()(x)  # too many tokens
        layer_of(remainder=2)(x[:3])  # others pass at low rank
        layer_of().train()(x[:3])  # statistics are wanted with the output
        layer_of(dtype=torch.bfloat16)(x[:3].bfloat16())  # products of matrices are faster
        adapted(x[:3])  # not what its weights say
    assert not calls


def test_a_nan_is_seen(calls):
    layer, x = layer_of(), torch.randn(3, 17)
    x[1, 4] = float("nan")
    with torch.no_grad():
        found = layer(x).hidden
    assert calls
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
