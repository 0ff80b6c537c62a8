"""Mixtures of ours as the stock ones that compute the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo.layers.sparse_moe import SparseMoE
from moezoo_models.adopt.reading import entry_of, hold, mixtures_of
from moezoo_models.checkpoints.directory import quiet, save_checkpoint
from moezoo_models.export.formats import CANDIDATES
from moezoo_models.export.stock import export_stock

MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16}
SIGMOID = {"score": "sigmoid", "selection_bias": True}


def rule(class_path, layers="all", **arguments):
    return {"layers": layers, "class_path": f"moezoo.{class_path}", "init_args": arguments}


DENSE = rule("DenseFFN", d_ff=48)


def mixture(layers="all", **arguments):
    return rule("SparseMoE", layers, **{**MOE, **arguments})


LATENT = {
    "latent_attention": {
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    },
    "num_key_value_heads": None,
}
RAW = {"num_shared_experts": 1, "router": {"normalize": False}}

KINDS = {
    "mixtral": {"ffn": [mixture()]},
    "mixtral, windows, heads": {"sliding_window": 8, "head_dim": 16, "ffn": [mixture()]},
    "mixtral, trained otherwise": {
        "trained_length": 16,
        "ffn": [mixture(router={"jitter": 0.1}, balance={"z_loss": 0.1}, activation="gelu")],
    },
    "qwen3_moe": {
        "qk_norm": True,
        "head_dim": 16,
        "ffn": [DENSE, mixture([0, 2], router={"normalize": False})],
    },
    "qwen3_moe, biases": {
        "qk_norm": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn": [mixture()],
    },
    "qwen2_moe": {
        "attention_bias": True,
        "ffn": [
            rule("DenseFFN", d_ff=48, activation="relu"),
            mixture([0, 2], num_shared_experts=1, d_shared=24, shared_gate=True, activation="relu"),
        ],
    },
    "qwen2_moe, no shared expert": {"ffn": [mixture(router={"normalize": False})]},
    "glm4_moe": {
        "qk_norm": True,
        "attention_bias": True,
        "ffn": [
            DENSE,
            mixture([1, 2], num_shared_experts=2, router={**SIGMOID, "scale": 2.5}),
        ],
    },
    "glm4_moe, no bias, not normalized": {
        "tie_word_embeddings": True,
        "ffn": [mixture(router={"score": "sigmoid", "normalize": False})],
    },
    "glm4_moe, groups": {
        "ffn": [mixture(num_shared_experts=1, router={**SIGMOID, "num_groups": 2, "top_groups": 1})]
    },
    "deepseek_v2": {**LATENT, "ffn": [DENSE, mixture([1, 2], **RAW)]},
    "deepseek_v2, groups, biases": {
        "latent_attention": {**LATENT["latent_attention"], "q_lora_rank": 12},
        "num_key_value_heads": None,
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn": [
            mixture(
                num_shared_experts=2,
                router={"normalize": False, "scale": 1.5, "num_groups": 2, "top_groups": 1},
            )
        ],
    },
    "deepseek_v3": {
        **LATENT,
        "latent_attention": {**LATENT["latent_attention"], "rope_interleave": False},
        "tie_word_embeddings": True,
        "ffn": [
            DENSE,
            mixture([2, 1], num_shared_experts=1, router={**SIGMOID, "scale": 2.5}),
        ],
    },
    "granitemoe": {
        "attention_bias": True,
        "attention_output_bias": True,
        "tie_word_embeddings": True,
        "ffn": [mixture()],
    },
}


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.eval()


def test_every_format_is_here():
    assert {kind.partition(",")[0] for kind in KINDS} == set(CANDIDATES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_unmodified_transformers_computes_the_same(kind, make, ids, tmp_path):
    model = perturbed(make(**KINDS[kind]))
    save_checkpoint(tmp_path / "ours", model)
    export_stock(tmp_path / "ours", tmp_path / "stock")
    raw = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert raw["model_type"] == kind.partition(",")[0]
    assert raw.get("trained_length") == model.config.trained_length
    with quiet():
        stock, problems = AutoModelForCausalLM.from_pretrained(
            tmp_path / "stock", output_loading_info=True, dtype=torch.float32
        )
    assert not any(problems.values())
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_the_tokenizer_goes_along_and_dtypes_stay(make, byte_level_tokenizer, tmp_path):
    model = make(vocab_size=300, **KINDS["mixtral"]).to(torch.bfloat16)
    save_checkpoint(tmp_path / "ours", model, byte_level_tokenizer)
    export_stock(tmp_path / "ours", tmp_path / "stock")
    assert (tmp_path / "stock" / "tokenizer.json").is_file()
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto")
    assert stock.dtype == torch.bfloat16
    ours = model.state_dict()["model.layers.2.mlp.experts.gate_up_proj"]
    theirs = stock.state_dict()["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn": [mixture(num_shared_experts=1)]}, "nearest is mixtral, where d_shared is 0 and "),
        ({"qk_norm": True, "ffn": [mixture(bias=True)]}, "qwen3_moe, where bias is False and not"),
        (
            {"ffn": [mixture(router={"score": "sqrt_softplus"})]},
            "mixtral, where router.score is softmax and not sqrt_softplus, and ",
        ),
        (
            {"ffn": [mixture(capacity={"factor": 1.0})]},
            "mixtral, where capacity.factor is None and not 1.0",
        ),
        (
            {"ffn": [mixture(router={"logits": {"softcap": 2.0}})]},
            "mixtral, where router.logits.softcap is 0.0 and not 2.0: keep",
        ),
        (
            {"attention_output_bias": True, "ffn": [mixture()]},
            r"mixtral, where attention's output has no bias \(attention_output_bias\)",
        ),
        (
            {"qk_norm": True, "sliding_window": 8, "ffn": [mixture()]},
            r"where .*(no norms|sees all positions)",
        ),
        (
            {"ffn": [DENSE, mixture([0, 1], router=SIGMOID)]},
            "glm4_moe, where only the first layers are dense",
        ),
        ({"ffn": [DENSE, mixture([0, 1])]}, "no layer is dense|qwen2_moe"),
        (
            {"ffn": [mixture(), rule("SparseMoE", 1, **{**MOE, "d_expert": 8})]},
            "layer 1 has other options than the first mixture",
        ),
        (
            {"ffn": [mixture(), rule("DenseFFN", 1, d_ff=48), rule("DenseFFN", 2, d_ff=16)]},
            r"its dense layers are \[16, 48\] wide",
        ),
        ({"ffn": [mixture(), rule("DenseFFN", 1, d_ff=48, bias=True)]}, "layer 1 is a dense block"),
        (
            {"ffn": [mixture(), rule("CarvedMoE", 2, num_experts=4, top_k=2, d_expert=8)]},
            "layer 2 is a CarvedMoE, in no stock format",
        ),
        (
            {
                **LATENT,
                "latent_attention": {**LATENT["latent_attention"], "rope_interleave": False},
                "ffn": [mixture(**RAW)],
            },
            r"deepseek_v2, where neighbours are turned together \(latent_attention.rope_interleave",
        ),
        ({**LATENT, "ffn": [mixture()]}, "deepseek_v2, where router.normalize is False and not"),
        ({"norm": "rms_wide", "ffn": [mixture()]}, "its norm is in no stock format of mixtures"),
        ({"logits_scaling": 2.0, "ffn": [mixture()]}, "its logits_scaling is in no stock format"),
        (
            {"ffn": [{**mixture(), "router_input": "pre_attention"}]},
            "the router of layer 0 reads what its experts do not",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_no_format_holds_is_refused_in_one_line(fields, message, make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(**fields))
    if "qwen2_moe" in message:  # which has dense layers where one likes
        export_stock(tmp_path / "ours", tmp_path / "stock")
        return
    with pytest.raises(InputError, match=message) as refused:
        export_stock(tmp_path / "ours", tmp_path / "stock")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "kind", ["qwen2_moe, no shared expert", "glm4_moe, no bias, not normalized"]
)
def test_a_shared_expert_without_neurons_is_none_to_adopt(kind, make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(**KINDS[kind]))
    export_stock(tmp_path / "ours", tmp_path / "stock")
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    for name, block in mixtures_of(stock).items():
        layer = hold(block, entry_of(block, name), name).layer
        assert isinstance(layer, SparseMoE)
        assert layer.d_shared == 0
        hidden = torch.randn(1, 7, 32)
        with torch.no_grad():
            torch.testing.assert_close(layer(hidden).hidden, block(hidden), rtol=0, atol=1e-5)
