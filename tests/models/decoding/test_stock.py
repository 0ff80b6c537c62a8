"""Stock mixtures are decoded as ours: the texts are those of their own `generate`."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList

from moezoo_models.decoding import loop, stock
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.decoding.stock import as_ours

from .test_decoder import left_padded, native_steps, torch_steps  # noqa: F401 - fixtures

ROPE = {"rope_type": "default", "rope_theta": 100.0}
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": ROPE,
    "max_position_embeddings": 64,
    "pad_token_id": 60,
    "bos_token_id": None,
    "eos_token_id": 7,
}
MANY = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
GROUPED = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 3.0,
    "head_dim": 8,
    "attention_bias": True,
}
FAMILIES = {
    "Dots1": GROUPED | {"norm_topk_prob": True},
    "Glm4Moe": GROUPED | {"use_qk_norm": True},
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "Qwen2Moe": MANY | {"shared_expert_intermediate_size": 12, "mlp_only_layers": [1]},
    "Qwen3Moe": MANY | {"norm_topk_prob": True, "head_dim": 16},
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
PARTIAL = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    *((family, YARN) for family in ("Mixtral", "Qwen3Moe", "Glm4Moe")),
    ("Dots1", {"sliding_window": 4, "layer_types": SLIDING}),
    ("Glm4Moe", {"first_k_dense_replace": 0, "use_qk_norm": False, "tie_word_embeddings": True}),
    ("Glm4Moe", PARTIAL),
    ("Glm4Moe", {"n_group": 2, "topk_group": 1}),
    ("Glm4Moe", {"n_shared_experts": 0, "norm_topk_prob": False}),
    ("Mixtral", {"sliding_window": 4, "head_dim": 16}),
    ("Mixtral", {"num_experts_per_tok": 5, "hidden_act": "gelu_pytorch_tanh"}),
    ("Olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, "attention_bias": True}),
    ("Qwen2Moe", {"qkv_bias": False, "norm_topk_prob": True, "tie_word_embeddings": True}),
    ("Qwen2Moe", {"use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING}),
    ("Qwen3Moe", {"norm_topk_prob": False, "attention_bias": True, "decoder_sparse_step": 2}),
    ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 5}),
]


def build(family="Glm4Moe", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    # GLM-4's configuration writes into the rotary parameters that it is given.
    fields = copy.deepcopy({**FIELDS, **FAMILIES[family], **changes})
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            one, wide = float("norm" in name), max(1, tensor.shape[-1])
            tensor.copy_(one + torch.randn(tensor.shape) * wide**-0.5)
        model.lm_head.weight.mul_(20)
    model.set_attn_implementation("sdpa")
    return model.to(dtype)


def texts(model, ids, mask):
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[7], pad_token_id=60)
    return loop.continue_ids(model, ids, mask, config, processors=LogitsProcessorList())


@pytest.fixture
def of_generate(monkeypatch):
    """Return texts as transformers' own code writes them."""

    def written(model, ids, mask):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "as_ours", lambda model: None)
            return texts(model, ids, mask)

    return written


@torch.no_grad()
def assert_one_model(ours, model, ids, mask):
    assert ineligible(ours) is None
    assert {t.data_ptr() for t in ours.parameters()} == {
        t.data_ptr() for t in model.parameters() if t.numel()
    }
    found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (ours, model))
    torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared expert
def test_texts_are_those_of_generate(
    native_steps,  # noqa: F811
    of_generate,
    batch,
    family,
    changes,
):
    model, (ids, mask) = build(family, **changes), left_padded(batch)
    ours = as_ours(model)
    assert_one_model(ours, model, ids, mask)
    blocks = Decoder(ours, ids, mask, 4)._blocks
    assert all(block.attend for block in blocks)
    assert all(block.feed for block in blocks) == ("topk_group" not in changes)
    assert torch.equal(texts(model, ids, mask), of_generate(model, ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_torch_alone(torch_steps, of_generate, family):  # noqa: F811
    model, (ids, mask) = build(family, torch.float64), left_padded(2)
    model.set_experts_implementation("eager")  # the others have no fp64
    assert_one_model(as_ours(model), model, ids, mask)
    assert torch.equal(texts(model, ids, mask), of_generate(model, ids, mask))


def test_every_family_is_tried():
    names = {path.rpartition(".")[2].removesuffix("ForCausalLM") for path in stock._FAMILIES}
    assert names == FAMILIES.keys()


def test_what_its_own_code_decodes():
    assert as_ours(build().train()) is None
    assert as_ours(build("Olmoe", clip_qkv=0.5)) is None
    assert as_ours(build("Mixtral", num_experts_per_tok=1)) is None  # ours would not normalize
    narrow = build()
    block = narrow.model.layers[0].mlp
    block.up_proj, block.gate_proj = (torch.nn.Linear(24, 8, bias=False) for _ in range(2))
    block.down_proj = torch.nn.Linear(8, 24, bias=False)
    assert as_ours(narrow) is None
    watched = build()
    assert as_ours(watched) is not None
    handle = watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert as_ours(watched) is None
    handle.remove()
    watched.model.layers[1].mlp.forward = watched.model.layers[1].mlp.forward
    assert as_ours(watched) is None
    eager = build()
    eager.set_attn_implementation("eager")
    assert as_ours(eager) is None
    replaced = build()
    replaced.model.layers[1].mlp = torch.nn.Sequential(replaced.model.layers[1].mlp)
    assert as_ours(replaced) is None
    assert as_ours(torch.nn.Linear(2, 2)) is None


def test_it_follows_the_model(of_generate):
    """What is kept from text to text is read anew where the model was changed in between."""
    model, (ids, mask) = build("Qwen3Moe"), left_padded(1)
    before = texts(model, ids, mask)
    ours = as_ours(model)
    assert as_ours(model) is ours
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight = torch.nn.Parameter(-gate.weight)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    assert as_ours(model) is ours
    assert_one_model(ours, model, ids, mask)
    after = texts(model, ids, mask)
    assert not torch.equal(after, before)
    assert torch.equal(after, of_generate(model, ids, mask))
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 2
        layer.input_layernorm.variance_epsilon = 2.0
    assert as_ours(model) is not ours
    assert_one_model(as_ours(model), model, ids, mask)
    assert torch.equal(texts(model, ids, mask), of_generate(model, ids, mask))


def test_it_goes_with_the_model():
    model = build("Mixtral")
    twin = weakref.ref(as_ours(model))
    copied = copy.deepcopy(model)
    assert as_ours(copied) is not twin()
    del model
    gc.collect()
    assert twin() is None
