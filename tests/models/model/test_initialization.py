"""Models that are materialized part by part, against the same models built at once."""

import pytest
import torch

import moezoo
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.model.initialization import deferred_init

METHODS = [pytest.param(method, id=method.name) for method in moezoo.zoo()]


def config(ffn: dict, **fields) -> MoezooConfig:
    return MoezooConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        allow_non_causal=True,
        ffn=[{"layers": "all", **ffn}],
        **fields,
    )


def assert_same(config: MoezooConfig) -> None:
    """Compare every tensor, buffers that are not saved too, and where random numbers go on."""
    torch.manual_seed(3)
    expected = MoezooForCausalLM(config)
    following = torch.rand(5)
    torch.manual_seed(3)
    with deferred_init() as deferred:
        model = MoezooForCausalLM(config)
    assert torch.equal(torch.rand(5), following)
    assert all(parameter.is_meta for parameter in model.parameters())
    for block in reversed(model.model.layers):
        deferred.materialize(block)
    deferred.materialize(model)
    deferred.materialize(model)  # there is nothing left to do
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(model, kind)())
        wanted = dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
            assert found[name].requires_grad == tensor.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_drawn_as_at_once(method):
    ffn = method.build(16).config()
    del ffn["init_args"]["d_model"]
    assert_same(config(ffn))


def test_tied_weights_and_shared_values():
    options = {"num_keys": 8, "num_heads": 2, "top_k": 4, "value_pool": "values"}
    ffn = {"class_path": "moezoo.MemoryPlus", "init_args": options}
    assert_same(config(ffn, tie_word_embeddings=True, attention_bias=True, qk_norm=True))
    latent = {"kv_lora_rank": 8, "q_lora_rank": 6}
    assert_same(config(ffn, latent_attention=latent))


def test_where_there_is_no_memory_anyway_nothing_is_deferred():
    with torch.device("meta"), deferred_init() as deferred:
        MoezooForCausalLM(config({"class_path": "moezoo.DenseFFN"}))
    assert deferred is None
