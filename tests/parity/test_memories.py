"""Layers beside blocks against transformers' own: Qwen4's memory of n-grams, Gemma's rows."""

import pytest
import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from moezoo import Engram, PerLayerEmbedding
from moezoo_models.model.memories import history_in

D = 16


def outcome(output, leaves):
    """Return the output and the gradient of a fixed mix of it."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), leaves)]


def assert_close(mine, other):
    for left, right in zip(mine, other, strict=True):
        scale = right.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(left, right, rtol=0, atol=2e-5 * scale)


@torch.no_grad()
def shaken(module, seed=1):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(std=0.4)
    return module


def pair(stream):
    """Return Qwen4's module of two residual streams, and ours of one of them."""
    qwen4 = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = qwen4.Qwen4ExpTextConfig(
        hidden_size=D, hc_count=2, vocab_size=50, eos_token_id=0, ngram_size=3, heads_per_ngram=2,
        ngram_vocab_size_base=60, ple_layer_ids=[1], ple_embed_dim=24, num_hidden_layers=2, seed=7,
    )  # fmt: skip
    theirs = shaken(qwen4.Qwen4ExpTextPLELayer(config, 0, 1))
    ours = Engram(
        D, d_ff=0, convolution=True, num_heads=2, num_rows=60, d_memory=24, index=1, seed=7,
        vocab_size=50, boundary_id=0,
    )  # fmt: skip
    own = slice(stream * D, (stream + 1) * D)
    with torch.no_grad():
        ours.table.weight.copy_(theirs.ple_embedding.ngram_embedding.weight[: ours.hash.total_rows])
        ours.value_proj.weight.copy_(theirs.value_proj.weight)
        ours.key_proj.weight.copy_(theirs.key_proj.weight[own])
        for mine, other in (("key_norm", "key"), ("query_norm", "query"), ("conv.norm", "conv")):
            weight = getattr(theirs, f"norm_{other}").weight[own]
            ours.get_submodule(mine).weight.copy_(1 + weight)
        ours.conv.weight.copy_(theirs.conv1d.weight[own, 0].flip(1).t())
    ids = torch.randint(1, 50, (2, 23), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 23, 2 * D, generator=torch.Generator().manual_seed(1))
    return theirs, ours, own, ids, hidden


@pytest.mark.parametrize("stream", [0, 1])
def test_engram_is_qwen4s_memory_of_one_residual_stream(stream):
    theirs, ours, own, ids, hidden = pair(stream)
    whole = hidden.clone().requires_grad_()
    answer = theirs(whole, ids, None)[..., own]
    other = outcome(answer, [whole, theirs.value_proj.weight, theirs.conv1d.weight])
    x = hidden[..., own].clone().requires_grad_()
    found = ours(x, token_ids=ids).hidden
    mine = outcome(found, [x, ours.value_proj.weight, ours.conv.weight])
    other[1] = other[1][..., own]
    other[3] = other[3][own, 0].flip(1).t()
    assert_close(mine, other)


def test_engram_goes_on_behind_a_cache_as_qwen4s_memory():
    theirs, ours, own, ids, hidden = pair(0)
    cache = LinearAttentionLayer(number_of_states=3)
    their_cache, our_cache = Cache(layers=[cache]), Cache(layers=[])
    history = history_in(our_cache, "memory", 0)
    with torch.no_grad():
        for begin, end in ((0, 11), (11, 12), (12, 13), (13, 23)):
            part = slice(begin, end)
            other = theirs(hidden[:, part], ids[:, part], their_cache)[..., own]
            mine = ours(hidden[:, part, own], token_ids=ids[:, :end], history=history).hidden
            assert_close([mine], [other])


def test_per_layer_embeddings_are_those_of_gemma3n():
    gemma = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    config = gemma.Gemma3nTextConfig(
        vocab_size=40, vocab_size_per_layer_input=40, hidden_size=D, intermediate_size=32,
        num_hidden_layers=2, hidden_size_per_layer_input=6, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, laurel_rank=4, num_kv_shared_layers=0, sliding_window=8,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2, pad_token_id=0,
        rms_norm_eps=1e-3,
    )  # fmt: skip
    theirs = shaken(gemma.Gemma3nTextModel(config)).eval()
    seen = {}
    number = 1
    block = theirs.layers[number]
    block.per_layer_input_gate.register_forward_hook(
        lambda _, given, __: seen.update(hidden=given[0].detach())
    )
    block.post_per_layer_input_norm.register_forward_hook(
        lambda _, __, answer: seen.update(answer=answer.detach())
    )
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs(ids, use_cache=False)
    ours = PerLayerEmbedding(D, d_row=6, vocab_size=40, norm_eps=1e-3)
    own = slice(number * 6, (number + 1) * 6)
    with torch.no_grad():
        ours.table.weight.copy_(theirs.embed_tokens_per_layer.weight[:, own])
        ours.embedding_proj.weight.copy_(theirs.per_layer_model_projection.weight[own])
        ours.embedding_norm.weight.copy_(theirs.per_layer_projection_norm.weight)
        ours.gate_proj.weight.copy_(block.per_layer_input_gate.weight)
        ours.out_proj.weight.copy_(block.per_layer_projection.weight)
        ours.out_norm.weight.copy_(block.post_per_layer_input_norm.weight)
        entering = theirs.embed_tokens(ids)
        found = ours(seen["hidden"], token_ids=ids, embeddings=entering).hidden
    assert_close([found], [seen["answer"]])
