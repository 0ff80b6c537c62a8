"""The attention backends agree with each other, and a missing one says why."""

import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo_models.model import attention_backends
from moezoo_models.model.attention_backends import (
    ATTENTION,
    check_backend,
    xformers_attention,
    xformers_missing,
)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}, {"qk_norm": True}])
@pytest.mark.parametrize("padding", [False, True])
def test_eager_and_sdpa_agree(make, ids, fields, padding):
    mask = padded(ids) if padding else torch.ones_like(ids)
    results = [
        make(attn_implementation=name, **fields)(ids, attention_mask=mask).logits[mask.bool()]
        for name in ("eager", "sdpa")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention compiles with g++ on a CPU")
def test_flex_attention_agrees(make, ids):
    mask = padded(ids)
    with torch.no_grad():
        results = [
            make(attn_implementation=name, hidden_size=64, num_hidden_layers=1)(
                ids, attention_mask=mask
            ).logits[mask.bool()]
            for name in ("flex_attention", "sdpa")
        ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_sdpa_runs_in_fp32_inside_cpu_autocast(make, ids, monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype, torch.is_autocast_enabled("cpu")))
        return real(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = make(num_hidden_layers=1)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, attention_mask=padded(ids) * 0 + 1, labels=ids).loss
    rounded.backward()
    float32 = torch.float32
    assert seen == [(float32, float32, float32, False)] * 2
    assert rounded.dtype == float32
    assert 0 < (exact - rounded).abs() < 0.02
    monkeypatch.undo()
    bf16 = make(num_hidden_layers=1).bfloat16()
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    bf16(ids)
    assert seen[-1][0] == torch.bfloat16  # without autocast, the model's dtype is the user's wish


def test_transformers_own_models_keep_their_sdpa():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not ATTENTION["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["xformers"] is ATTENTION["xformers"]


def test_unknown_and_missing_backends(make):
    with pytest.raises(InputError, match="attention: 'sdpaa' is not known; did you mean 'sdpa'"):
        make(attn_implementation="sdpaa")
    for name, reason in attention_backends.attention_backends().items():
        if reason is None:
            check_backend(name)
        else:
            with pytest.raises(InputError, match=f"attention: '{name}' cannot be used here: ") as e:
                make(attn_implementation=name)
            assert reason in str(e.value)
            assert "\n" not in str(e.value)


def test_reasons_for_xformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in (xformers_missing() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in (xformers_missing() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert xformers_missing() is None


class LowerTriangularMask:
    """Stands in for xformers' class of that name."""


def memory_efficient_attention(query, key, value, attn_bias, p, scale):
    """Stand in for xformers' operator, which has no CPU form: its interface, in plain torch."""
    assert query.shape[0::2] == key.shape[0::2] == value.shape[0::2]  # (B, M, H, K)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if isinstance(attn_bias, LowerTriangularMask):
        assert query.shape[1] == key.shape[1]
        scores += torch.full_like(scores, float("-inf")).triu(1)
    elif attn_bias is not None:
        assert attn_bias.shape == scores.shape
        assert attn_bias.dtype == query.dtype
        assert attn_bias.stride(-2) % 8 == 0
        scores += attn_bias
    assert p == 0.0
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.fixture
def _xformers_on_cpu(monkeypatch):
    ops = types.ModuleType("xformers.ops")
    ops.LowerTriangularMask = LowerTriangularMask
    ops.memory_efficient_attention = memory_efficient_attention
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_backends, "xformers_missing", lambda: None)


@pytest.mark.usefixtures("_xformers_on_cpu")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padding", [False, True])
def test_what_xformers_is_given(make, ids, window, padding):
    mask = padded(ids) if padding else None
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    results, texts = [], []
    for name in ("xformers", "sdpa"):
        model = make(attn_implementation=name, sliding_window=window).eval()
        results.append(model(ids, attention_mask=mask).logits[real])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        texts.append(model.generate(ids, attention_mask=real.long(), **options))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(texts[0], texts[1])


def test_xformers_refuses_to_run_where_it_can_not(make, ids, monkeypatch):
    monkeypatch.setattr(attention_backends, "xformers_missing", lambda: "there is no such thing")
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InputError, match="'xformers' cannot be used here: there is no such thing"):
        xformers_attention(torch.nn.Identity(), query, query, query, None, scaling=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(xformers_missing() is not None, reason=str(xformers_missing()))
def test_xformers_agrees_on_a_gpu(make, ids):
    mask = padded(ids).cuda()
    results = [
        make(attn_implementation=name).cuda()(ids.cuda(), attention_mask=mask).logits[mask.bool()]
        for name in ("xformers", "sdpa")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
