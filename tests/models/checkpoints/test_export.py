"""Dense models of ours, written as the stock architectures that they are."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.checkpoints.export import export

DENSE = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}
KINDS = {
    "llama": {},
    "llama, tied, biases": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn": [{**DENSE, "init_args": {"d_ff": 48, "bias": True, "activation": "relu"}}],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
    },
    "mistral": {"sliding_window": 8},
    "qwen2": {"attention_bias": True, "eos_token_id": [1, 2]},
    "qwen2, windows": {
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen3, biases": {"qk_norm": True, "attention_bias": True, "attention_output_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_unmodified_transformers_computes_the_same(kind, make, ids, tmp_path):
    model = make(**{"ffn": [DENSE], **KINDS[kind]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_checkpoint(tmp_path / "ours", model)
    export(tmp_path / "ours", tmp_path / "stock")
    raw = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert raw["model_type"] == kind.partition(",")[0]
    stock, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stock", output_loading_info=True
    )
    assert not any(problems.values())
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_there_and_back_is_the_same_model(make, byte_level_tokenizer, tmp_path):
    save_checkpoint(tmp_path / "ours", make(ffn=[DENSE]), byte_level_tokenizer)
    export(tmp_path / "ours", tmp_path / "stock")
    back, tokenizer = load_checkpoint(tmp_path / "stock")
    assert tokenizer.fingerprint() == byte_level_tokenizer.fingerprint()
    for name, tensor in make(ffn=[DENSE]).state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_the_trained_length_is_kept_there_and_back(make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(ffn=[DENSE], trained_length=16))
    export(tmp_path / "ours", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert stock.config.trained_length == 16
    assert load_checkpoint(tmp_path / "stock")[0].config.trained_length == 16
    save_checkpoint(tmp_path / "before", make(ffn=[DENSE]))
    export(tmp_path / "before", tmp_path / "as before")
    raw = json.loads((tmp_path / "as before" / "config.json").read_text())
    assert "trained_length" not in raw  # as it is not known


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True, "sliding_window": 8, "qk_norm": True}, "its attention is none"),
        ({"attention_output_bias": True}, "its attention is none of llama, mistral, qwen2, qwen3"),
        (
            {"ffn": [DENSE, {"layers": 1, "class_path": "moezoo.SparseMoE"}]},
            "layer 1 is a SparseMoE; only dense models are stock",
        ),
        (
            {"ffn": [{**DENSE, "init_args": {"gated": False}}]},
            "layer 0 is not gated, or unlike the first",
        ),
        (
            {"ffn": [{**DENSE, "init_args": {"glu": {"limit": 7.0}}}]},
            "layer 0 bounds its gated linear units",
        ),
    ],
)
def test_what_is_no_stock_model_is_refused(fields, message, make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(**{"ffn": [DENSE], **fields}))
    with pytest.raises(InputError, match=message):
        export(tmp_path / "ours", tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_nothing_is_replaced(make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(ffn=[DENSE]))
    with pytest.raises(InputError, match="is there already"):
        export(tmp_path / "ours", tmp_path / "ours")
