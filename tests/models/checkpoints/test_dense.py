"""Dense Llama, Mistral, Qwen2 and Qwen3 directories load as ours and compute the same."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from moezoo import InputError
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.checkpoints.directory import load_checkpoint

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, biases, llama3 rope": LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama yarn": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE, hidden_act="gelu"),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral window": MistralConfig(**SIZES, sliding_window=8, head_dim=16),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3 biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, hidden_act="relu"),
}


def theirs(config: PreTrainedConfig) -> torch.nn.Module:
    """Make a model whose every tensor matters to the output: theirs start at 0 or nearly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model.eval()


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    model = theirs(MODELS[request.param])
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_checkpoint(tmp_path)
    assert tokenizer is None
    return model, loaded


def test_equal_logits_gradients_and_text(pair):
    ids = torch.randint(3, 101, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :20] = 0, 0
    labels = ids.where(mask.bool(), -100)
    outputs = [model(ids, attention_mask=mask, labels=labels) for model in pair]
    logits = [output.logits[mask.bool()] for output in outputs]
    assert logits[0].std() > 0.5
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)

    for output in outputs:
        output.loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in pair]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)

    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    prompts = {"inputs": ids[:2, :20], "attention_mask": mask[:2, :20]}
    texts = [model.generate(**prompts, **options) for model in pair]
    assert texts[0].shape == (2, 52)
    assert torch.equal(texts[1], texts[0])


def test_windows_matter_at_this_length():
    """The test above would not notice a lost window if it were longer than the text."""
    ids = torch.randint(3, 101, (1, 40))
    with_window, without = (
        theirs(MistralConfig(**SIZES, sliding_window=window))(ids).logits for window in (8, None)
    )
    assert (with_window - without)[:, -1].abs().max() > 0.01


def test_bf16_weights_stay_bf16_and_equal(tmp_path):
    theirs(MODELS["qwen3"]).bfloat16().save_pretrained(tmp_path)
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    # Cast by hand, theirs would round the rotary frequencies, too.
    assert torch.equal(loaded.float().bfloat16()(ids).logits, expected)


def test_configs_of_old_and_odd_ids(tmp_path):
    """Rotary parameters outside rope_parameters; -1 for "no padding"; stored frequencies."""
    raw = {
        **{key: value for key, value in SIZES.items() if value is not None},
        "model_type": "llama",
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "pad_token_id": -1,
        "eos_token_id": [2, 500],
        "torch_dtype": "float32",
    }
    config = dense_config(raw)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config.rope_parameters["factor"] == 2.0
    assert config.pad_token_id is None
    assert config.eos_token_id == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "model_type: 'bloom' cannot be loaded; choose from: gemma2"),
        ({"model_type": "qwen4"}, "model_type: 'qwen4' cannot be loaded; did you mean 'qwen"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights"),
        ({"hidden_size": "wide"}, r"hidden_size: 'wide' is not a whole number"),
        ({"num_attention_heads": 5}, r"config.json: .*hidden size"),
    ],
)
def test_what_can_not_be_loaded(changes, message):
    raw = json.loads(LlamaConfig(**SIZES).to_json_string()) | changes
    with pytest.raises(InputError, match=message) as caught:
        dense_config(raw)
    assert "\n" not in str(caught.value)
