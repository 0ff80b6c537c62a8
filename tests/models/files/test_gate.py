"""Every reader refuses a damaged model directory, and all of them with the same line."""

import sys
from pathlib import Path

import pytest
import torch

from moezoo import InputError

sys.path.insert(0, str(Path(__file__).parent))

from damages import (
    AUTO,
    LLAMA,
    OURS,
    all_refuse,
    cast,
    change_config,
    change_tensors,
    config_text,
    flip_a_bit,
    generation,
    index_of,
    link_out,
    metadata,
    poison,
    replace_by_link,
)

WEIGHTS = {
    "shard elsewhere": (index_of("../x.safetensors"), r"is in '\.\./x\.safetensors', which is not"),
    "shard no text": (index_of(3), r"is in 3, which is not the plain name of a file"),
    "shard with NUL": (index_of("x\0.safetensors"), r"which is not the plain name of a file"),
    "shard a folder": (index_of(".."), r"is in '\.\.', which is not"),
    "link out": (link_out, r"model\.safetensors is a link out of its directory, to .*copy the"),
    "int8": (cast(torch.int8), r"'model\.norm\.weight' in .* is I8; cast it to"),
    "fp8": (cast(torch.float8_e4m3fn), r"'model\.norm\.weight' in .* is F8_E4M3; cast it to"),
    "NaN": (poison(float("nan")), r"norm\.weight' in .* holds NaN or infinity"),
    "infinity": (poison(float("-inf")), r"norm\.weight' in .* holds NaN or infinity"),
    "flipped bit": (flip_a_bit, r"model\.safetensors is truncated or damaged \(its checksum is"),
    "no metadata": (metadata(None), r"is truncated or damaged \(the metadata of its header is no"),
    "no head": (
        change_tensors(lambda tensors: tensors.pop("lm_head.weight")),
        r"'lm_head\.weight' is missing from the weights",
    ),
    "another head": (
        change_config(tie_word_embeddings=True),
        r"tie_word_embeddings is true in .*, but 'lm_head\.weight' differs from",
    ),
    "layers without end": (
        change_config(num_hidden_layers=60_000, layer_types=None),
        "num_hidden_layers: 60000, but no tensor of layer 3 is in the weights",
    ),
    "wider": (
        change_config(hidden_size=1 << 20, head_dim=None),
        r"'model\.embed_tokens\.weight' has shape \(300, 32\), by config\.json \(300, 1048576\)",
    ),
}
FIELDS = {
    "tie": ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
    "more layers than any": ({"num_hidden_layers": 1 << 40}, "num_hidden_layers: .* is out of"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: 0 is out of range"),
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads: -4 is out of range"),
    "heads": ({"num_attention_heads": 5, "head_dim": None}, "32 is not divisible by num_atten"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
    "head_dim": ({"head_dim": 7}, "head_dim: 7 is odd"),
    "dtype": ({"dtype": 3}, "dtype: 3 is not text"),
    "fp8": ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn' is not known"),
    "rope": ({"rope_parameters": [1]}, r"rope_parameters: \[1\] is not a mapping"),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        "rope_theta: 'x' is not a number",
    ),
    "factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        "rope_parameters: factor: 0 is out of range",
    ),
    "layer_types": ({"layer_types": 3}, "layer_types: 3 is not a list of names"),
    "layer_types of numbers": ({"layer_types": [1, 2, 3]}, r"layer_types: \[1, 2, 3\] is not a"),
    "id2label": ({"id2label": ["a"]}, r"id2label: \['a'\] is not a mapping"),
    "label": ({"id2label": {"x": "a"}}, "id2label: 'x' is not the number of a label"),
    "labels without end": ({"num_labels": 1 << 40}, "num_labels: .* is out of range"),
    "experts": ({"experts_implementation": 3}, "experts_implementation: 3 is not text"),
    "eps": ({"rms_norm_eps": -1.0}, "rms_norm_eps: -1 is out of range"),
    "eos": ({"eos_token_id": "x"}, "eos_token_id: 'x' is not a whole number"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights"),
}
FILES = {
    "model_type": (change_config(model_type=["llama"]), r"model_type: \['llama'\] is not text"),
    "NaN": (config_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'), "NaN is not a finite"),
    "overflow": (config_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'), "1e999 is not a f"),
    "digits": (config_text('"vocab_size": 300', f'"vocab_size": 3{"0" * 5000}'), "a number has 5"),
    "nested": (
        config_text('"vocab_size": 300', f'"x": {"[" * 100_000}{"]" * 100_000}'),
        "config.json cannot be read: it is nested too deeply",
    ),
    "nested within what Python takes": (
        config_text('"vocab_size": 300', f'"x": {"[" * 200}{"]" * 200}'),
        "config.json cannot be read: it is nested too deeply",
    ),
    "twice": (config_text('"vocab_size": 300', '"vocab_size": 300, "vocab_size": 9'), "'vocab_siz"),
    "surrogate": (config_text('"vocab_size": 300', r'"x": "\ud800"'), "config.json cannot be read"),
    "list": (config_text("{", "[{", "]"), "is not a JSON object"),
    "generation list": (generation("[]"), "generation_config.json is not a JSON object"),
    "generation nested": (generation("[" * 100_000), "generation_config.json cannot be read"),
    "beams": (generation('{"num_beams": 1000000000}'), "num_beams: .* is out of range"),
    "ends": (generation('{"eos_token_id": ["x"]}'), "eos_token_id: 'x' is not a whole number"),
    "cache": (generation('{"cache_implementation": "x"}'), "generation_config.json: Invalid `cac"),
    "flags": (generation('{"output_attentions": 0}'), "output_attentions: 0 is not true or false"),
    "generation link": (
        replace_by_link("generation_config.json"),
        "generation_config.json is a link that leads nowhere; copy it",
    ),
    "adapters": (
        lambda directory: (directory / "adapter_config.json").write_text("{}"),
        "holds a model and adapters",
    ),
    "no model": (
        lambda directory: (directory / "config.json").rename(directory / "adapter_config.json"),
        "holds adapters alone; give the merged model",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_of_ours(name, ours, place):
    damage, message = WEIGHTS[name]
    damage(ours)
    all_refuse(OURS, ours, place, message)
    for load in AUTO[:1] if name == "no head" else AUTO:  # the decoder alone has none
        with pytest.raises(InputError, match=message):
            load(ours)


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_of_a_llama(name, llama, place):
    damage, message = WEIGHTS[name]
    damage(llama)
    all_refuse(LLAMA, llama, place, message)


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields_of_ours(name, ours, place):
    fields, message = FIELDS[name]
    change_config(**fields)(ours)
    all_refuse(OURS, ours, place, message)
    for load in AUTO:
        with pytest.raises(InputError, match=message):
            load(ours)


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields_of_a_llama(name, llama, place):
    fields, message = FIELDS[name]
    change_config(**fields)(llama)
    all_refuse(LLAMA, llama, place, message)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, ours, place):
    damage, message = FILES[name]
    damage(ours)
    all_refuse(OURS, ours, place, message)
