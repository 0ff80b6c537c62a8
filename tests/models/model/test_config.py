"""The configuration: what it fills in, what it refuses, and that it survives JSON."""

import json

import pytest
import torch
from transformers import AutoConfig

from moezoo import InputError
from moezoo_models import MoezooConfig, MoezooForCausalLM

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}
DENSE = {"layers": "all", "class_path": "moezoo.DenseFFN"}


def test_defaults_follow_from_other_fields():
    config = MoezooConfig(**SMALL)
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert config.layer_types == ["full_attention"] * 4
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    windowed = MoezooConfig(**SMALL, sliding_window=5, rope_theta=5e5)
    assert windowed.layer_types == ["sliding_attention"] * 4
    assert windowed.rope_parameters["rope_theta"] == 5e5


def test_later_rules_win():
    config = MoezooConfig(
        **SMALL,
        ffn=[
            DENSE,
            {"layers": "every 2", "class_path": "moezoo.SparseMoE"},
            {"layers": [-1], "class_path": "moezoo.DenseFFN", "init_args": {"gated": False}},
        ],
    )
    assert [config.feed_forward(layer)[0] for layer in range(4)] == [0, 1, 0, 2]
    assert config.feed_forward(3)[1]["init_args"] == {"gated": False}


def test_json_round_trip_and_auto_class(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    config = MoezooConfig(
        **SMALL, ffn=[DENSE], qk_norm=True, rope_parameters=scaled, eos_token_id=[1, 2]
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MoezooConfig)
    again.name_or_path = ""
    assert again.to_dict() == config.to_dict()
    assert MoezooConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_the_model_records_what_its_layers_default_to():
    """A checkpoint must not change when a layer's default does."""
    config = MoezooConfig(**SMALL, ffn=[DENSE, {"layers": 0, "class_path": "moezoo.SparseMoE"}])
    model = MoezooForCausalLM(config)
    for layer, block in enumerate(model.model.layers):
        arguments = block.mlp.config()["init_args"]
        assert arguments.pop("d_model") == 32
        assert config.feed_forward(layer)[1]["init_args"] == arguments
    assert config.feed_forward(0)[1]["init_args"]["num_experts"] == 8
    MoezooForCausalLM(MoezooConfig.from_dict(json.loads(config.to_json_string())))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, r"hidden_size: 30 is not divisible by num_attention_heads 4; make"),
        ({"hidden_size": "32"}, "hidden_size: '32' is not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is out of range"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"hiden_size": 32}, "hiden_size: no such field; did you mean 'hidden_size'"),
        ({"intermediate_size": 32}, "intermediate_size: no such field"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 entries for num_hidden_layers 4"),
        ({"layer_types": ["full"] * 4}, "layer_types: 'full' is not known; choose from"),
        ({"layer_types": ["sliding_attention"] * 4}, "set sliding_window"),
        ({"eos_token_id": 50}, "eos_token_id: 50 is out of range"),
        ({"trained_length": "64"}, "trained_length: '64' is not a whole number"),
        ({"trained_length": True}, "trained_length: True is not a whole number"),
        ({"trained_length": 4096}, "trained_length: 4096 is out of range; give .* ≤ 2048"),
        ({"attention_dropout": 1.5}, "attention_dropout: 1.5 is out of range"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: .*factor"),
        (
            {"rope_parameters": {"rope_type": "linar"}},
            "'linar' is not known; did you mean 'linear'",
        ),
        ({"ffn": "moezoo.DenseFFN"}, "ffn: 'moezoo.DenseFFN' is not a list of rules"),
        ({"ffn": [{**DENSE, "layer": 1}]}, r"ffn\[0\]: unknown key 'layer'; did you mean 'layers'"),
        ({"ffn": [{"layers": "all"}]}, r"ffn\[0\]: class_path is missing"),
        ({"ffn": [DENSE, {**DENSE, "layers": 4}]}, r"ffn\[1\]: layers: there is no layer 4"),
        ({"ffn": [{**DENSE, "layers": "some"}]}, r"ffn\[0\]: layers: 'some' is not understood"),
        ({"ffn": [{**DENSE, "layers": [0, 1]}]}, "ffn: no rule for layer 2"),
        ({"ffn": [{**DENSE, "init_args": [1]}]}, r"ffn\[0\]: init_args: \[1\] is not a mapping"),
        ({"ffn": [{**DENSE, "init_args": {"d_model": 9}}]}, "d_model 9 is not the model's hidden"),
        (
            {"ffn": [{**DENSE, "class_path": "moezoo.DenseFNN"}]},
            r"ffn\[0\]: class_path: no layer 'moezoo.DenseFNN'; did you mean 'moezoo.DenseFFN'",
        ),
        ({"ffn": [{**DENSE, "class_path": "os.system"}]}, "class_path: no layer 'os.system'"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        MoezooConfig(**{**SMALL, **fields})
    assert "\n" not in str(caught.value)


def test_fields_changed_later_are_checked_by_the_model():
    config = MoezooConfig(**SMALL)
    config.num_key_value_heads = 3
    with pytest.raises(InputError, match="num_key_value_heads"):
        MoezooForCausalLM(config)


def test_mistakes_in_layer_arguments_name_the_rule():
    rules = [DENSE, {"layers": 1, "class_path": "moezoo.SparseMoE", "init_args": {"num_expert": 4}}]
    with pytest.raises(InputError, match=r"ffn\[1\]: .*'num_expert'; did you mean 'num_experts'"):
        MoezooForCausalLM(MoezooConfig(**SMALL, ffn=rules))


def test_a_layers_own_configuration_is_a_rule():
    with torch.device("meta"):
        model = MoezooForCausalLM(MoezooConfig(**SMALL))
    rule = {"layers": "all", **model.model.layers[0].mlp.config()}
    assert MoezooConfig(**SMALL, ffn=[rule]).ffn[0]["init_args"]["d_ff"] == 96
