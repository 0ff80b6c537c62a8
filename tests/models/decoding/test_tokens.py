"""Tokens of models in memory, against transformers' `generate`."""

import pytest
import torch
from transformers import GenerationConfig

from moezoo.errors import InputError
from moezoo_models.decoding.tokens import continue_tokens

from .test_decoder import build as build_ours  # noqa: F401 - a fixture
from .test_decoder import left_padded
from .test_stock import build


@pytest.fixture(params=["ours", "Qwen3Moe", "Glm4Moe", "eager"])
def model(request, build_ours):  # noqa: F811
    if request.param == "ours":
        return build_ours(ffn=[{"layers": "all", "class_path": "moezoo.SparseMoE"}])
    if request.param == "eager":  # which transformers decodes
        stock = build("Mixtral")
        stock.set_attn_implementation("eager")
        return stock
    return build(request.param)


def of_generate(model, ids, mask, **settings):
    config = GenerationConfig(max_new_tokens=9, pad_token_id=60, **settings)
    model.generation_config = GenerationConfig()
    return model.generate(ids, attention_mask=mask, generation_config=config)


@pytest.mark.parametrize("ends", [None, 7, (7, 19, 58)])
def test_greedy_tokens(model, ends):
    ids, mask = left_padded(3)
    stops = list(ends) if isinstance(ends, tuple) else ends
    expected = of_generate(model, ids, mask, do_sample=False, eos_token_id=stops)
    model.generation_config = GenerationConfig(repetition_penalty=9.0, eos_token_id=3)
    model.train()
    options = {"max_new_tokens": 9, "eos_token_id": ends, "pad_token_id": 60}
    found = continue_tokens(model, ids, mask, **options)
    assert torch.equal(found, expected)
    assert model.training
    assert not found.requires_grad


def test_sampled_tokens(model):
    ids, mask = left_padded(1)
    drawn = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    expected = of_generate(model, ids, mask, do_sample=True, **drawn)
    torch.manual_seed(5)
    assert torch.equal(continue_tokens(model, ids, max_new_tokens=9, **drawn), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "options", "message"),
    [
        ([5, 3], None, {}, r"input_ids: shape \(2,\); give \(batch, at least 1\)"),
        ([[]], None, {}, r"input_ids: shape \(1, 0\)"),
        ([[5, 61]], None, {}, "input_ids: token id 61 is outside the model's vocabulary of 61"),
        ([[5, 3]], [[1]], {}, r"attention_mask: shape \(1, 1\) does not match input_ids' \(1, 2\)"),
        ([[5, 3]], [[1, 0]], {}, "attention_mask: a prompt ends with padding; pad on the left"),
        ([[5, 3]], None, {"max_new_tokens": 0}, "max_new_tokens: 0"),
        ([[5, 3]], None, {"temperature": -1.0}, "temperature: -1"),
    ],
)
def test_what_is_refused(ids, mask, options, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(InputError, match=message):
        continue_tokens(
            build("Mixtral"), torch.tensor(ids).long(), mask, **{"max_new_tokens": 2, **options}
        )
