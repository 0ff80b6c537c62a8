"""GLM-4.5's mixture is decoded as ours: the texts are those of its own `generate`."""

import pytest
import torch
from transformers import GenerationConfig, Glm4MoeConfig, Glm4MoeForCausalLM, LogitsProcessorList

from moezoo_models.decoding import loop
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.decoding.stock import as_ours

from .test_decoder import left_padded, native_steps  # noqa: F401 - a fixture

ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 3.0,
    "use_qk_norm": True,
    "attention_bias": True,
    "partial_rotary_factor": 1.0,
    "rope_parameters": ROPE,
    "max_position_embeddings": 64,
    "pad_token_id": 60,
    "eos_token_id": 7,
}


def stock(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**{**FIELDS, **changes})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            one = 1.0 if "norm" in name else 0.0
            tensor.copy_(one + torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        model.lm_head.weight.mul_(20)
    model.set_attn_implementation("sdpa")
    return model.to(dtype)


def texts(model, ids, mask):
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[7], pad_token_id=60)
    return loop.continue_ids(model, ids, mask, config, processors=LogitsProcessorList())


@pytest.mark.parametrize(
    "changes",
    [{}, {"first_k_dense_replace": 0, "use_qk_norm": False, "tie_word_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_those_of_generate(monkeypatch, native_steps, batch, changes):  # noqa: F811
    model, (ids, mask) = stock(**changes), left_padded(batch)
    ours = as_ours(model)
    assert ineligible(ours) is None
    assert {t.data_ptr() for t in ours.parameters()} == {t.data_ptr() for t in model.parameters()}
    with torch.no_grad():
        blocks = Decoder(ours, ids, mask, 4)._blocks
        assert all(block.attend and block.feed for block in blocks)
        found, expected = (
            each(input_ids=ids, attention_mask=mask).logits for each in (ours, model)
        )
        torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-3, rtol=1e-4)
    found = texts(model, ids, mask)
    monkeypatch.setattr(loop, "as_ours", lambda model: None)
    assert torch.equal(found, texts(model, ids, mask))


def test_what_its_own_code_decodes():
    assert as_ours(stock(n_group=2, topk_group=1)) is None
    assert as_ours(stock(rope_parameters={**ROPE, "partial_rotary_factor": 0.5})) is None
    assert as_ours(stock().train()) is None
    watched = stock()
    assert as_ours(watched) is not None
    handle = watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert as_ours(watched) is None
    handle.remove()
    watched.model.layers[1].mlp.forward = watched.model.layers[1].mlp.forward
    assert as_ours(watched) is None
    eager = stock()
    eager.set_attn_implementation("eager")
    assert as_ours(eager) is None
    assert as_ours(torch.nn.Linear(2, 2)) is None
