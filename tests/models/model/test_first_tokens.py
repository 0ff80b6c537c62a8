"""Blocks that treat the first tokens of a text apart are told where texts begin."""

import pytest
import torch

RULE = {"selection": {"kind": "threshold", "input": 0.6, "gate": 0.1}, "first_tokens": 1}


@pytest.fixture
def model(make, rules):
    ffn = [rules["rule"]("SelectiveFFN", d_ff=24, **RULE)]
    return make(ffn=ffn, num_hidden_layers=2).eval()


def logits(model, ids, **context):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **context).logits


def test_the_first_token_is_dense_and_the_others_are_not(model):
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    selective = logits(model, ids)
    for block in model.model.blocks():
        block.mlp.first_tokens = 7
    dense = logits(model, ids)
    for block in model.model.blocks():
        for buffer in block.mlp.selector.buffers():
            buffer.zero_()
        block.mlp.first_tokens = 0
    torch.testing.assert_close(logits(model, ids), dense)
    torch.testing.assert_close(selective[:, 0], dense[:, 0])
    assert not torch.allclose(selective[:, 1], dense[:, 1], atol=1e-4)


def test_left_padding_and_packed_texts_change_nothing(model):
    ids = torch.randint(3, 50, (1, 7), generator=torch.Generator().manual_seed(0))
    alone = logits(model, ids)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    beside = logits(model, padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(beside[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_generation_token_by_token_is_that_of_the_whole_text(model):
    ids = torch.randint(3, 50, (2, 1), generator=torch.Generator().manual_seed(0))
    written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = logits(model, written[:, :-1]).argmax(-1)
    assert torch.equal(written[:, 1:], expected)
