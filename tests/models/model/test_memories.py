"""Layers that blocks have beside their feed-forward blocks: what they read, caches, refusals."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from moezoo import InputError
from moezoo.experts import fetched_rows
from moezoo.feed_forward import FeedForward
from moezoo_models import MoezooConfig
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.inspect.common import routed_by_name

END = 5
SMALL = {"num_heads": 2, "num_rows": 40, "boundary_id": END}
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def skewed(model):
    """Leave no weight at zero, where a mistake in its use would not be seen."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def engram(make, rules):
    """Return a function that builds a model with two memories of n-grams."""
    dense = rules["rule"]("DenseFFN", d_ff=48)

    def build(**fields):
        memory = [rules["rule"]("Engram", [0, 2], **{**SMALL, **fields})]
        return skewed(make(ffn=[dense], memory=memory).double())

    return build


def stepped(model, ids, mask, cuts, cache):
    """Return the logits of a text that is read in parts, behind a cache."""
    places, found = (mask.cumsum(1) - 1).clamp(min=0), []
    for begin, end in zip([0, *cuts[:-1]], cuts, strict=True):
        step = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=places[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            context_ids=ids[:, :end],
        )
        cache = step.past_key_values
        found.append(step.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("cuts", [[5, 6, 12], range(1, 13)], ids=["parts", "tokens"])
@pytest.mark.parametrize("kind", ["made", "dynamic", "lazy", "static"])
def test_a_cache_changes_nothing(engram, ids, cuts, kind):
    """With padding before one text, and a document that ends within another."""
    model = engram()
    ids[0, 6] = END
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    makers = {
        "made": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=12),
    }
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(ids, attention_mask=mask, position_ids=places).logits
        found = stepped(model, ids, mask, list(cuts), makers[kind]())
    real = mask.bool()
    torch.testing.assert_close(found[real], whole[real], rtol=1e-10, atol=1e-12)


def test_a_history_of_another_text_changes_the_logits(engram, ids):
    """Or the test above would pass without any history."""
    model, cache = engram(), DynamicCache()
    with torch.no_grad():
        mask = torch.ones_like(ids)
        whole = model(ids).logits
        stepped(model, ids[:, :8], mask[:, :8], [8], cache)
        for layer in cache.layers[3:]:
            layer.keys = layer.keys.flip(0)
        after = stepped(model, ids[:, 8:], mask[:, 8:], [4], None)
        swapped = model(ids[:, 8:], past_key_values=cache, context_ids=ids, use_cache=True).logits
    assert len(cache.layers) == 5
    assert not torch.allclose(swapped[:, 0], whole[:, 8])
    assert not torch.allclose(after[:, 0], whole[:, 8])


def test_rows_are_fetched_some_blocks_before_they_are_read(make, rules, ids, monkeypatch):
    """And no more often than they are read; logits, and generated texts, stay."""
    elsewhere = {"sparse": True, "offload": True}
    kept, models = [], []
    for more in (elsewhere, {}):
        memory = [rules["rule"]("Engram", [1, 6], **SMALL, **more)]
        stem = [rules["rule"]("STEM", d_ff=24, vocab_size=61, **more)]
        models.append(skewed(make(ffn=stem, memory=memory, num_hidden_layers=7)))
    begin = fetched_rows._begin

    def watch(weight, indices):
        numbers = [n for n, layer in enumerate(reading) if layer.table.weight is weight]
        kept.append(("fetch", *numbers))
        return begin(weight, indices)

    blocks = list(models[0].model.blocks())
    reading = [layer for block in blocks for layer in block.layers_ahead()]
    assert len(reading) == 9
    monkeypatch.setattr(fetched_rows, "_begin", watch)
    for layer in reading:
        layer.register_forward_pre_hook(
            lambda layer, _: kept.append(("read", reading.index(layer)))
        )
    with torch.no_grad():
        found, expected = (model(ids).logits for model in models)
    assert torch.equal(found, expected)
    fetched, read = ([n for what, n in kept if what == kind] for kind in ("fetch", "read"))
    assert fetched == sorted(read) == list(range(9))
    # Those of five blocks, then one block's with each block.
    assert [what for what, _ in kept[:7]] == ["fetch"] * 6 + ["read"]
    assert kept.index(("read", 0)) < kept.index(("fetch", 6)) < kept.index(("read", 1))
    assert kept.index(("fetch", 8)) < kept.index(("read", 3))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(ids, **options) for model in models))


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_generated_as_without_a_cache(engram, ids, beams):
    model = engram(boundary_id=None)
    assert ineligible(model) is None
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found, expected = (
        model.generate(ids, attention_mask=mask, use_cache=cached, **options)
        for cached in (True, False)
    )
    assert torch.equal(found, expected)
    assert len({tuple(row[12:].tolist()) for row in found}) == 2


def test_documents_of_a_window_are_as_each_alone(make, rules):
    """To the memories; attention, which sees both, is left out of it by its values."""
    model = skewed(make(memory=[rules["rule"]("Engram", [0, 2], **SMALL)]).double())
    ids = torch.tensor([[9, 3, 9, 7, 8, END, 3, 9, 7, 8, 9, 3, 7]])
    with torch.no_grad():
        for block in model.model.blocks():
            block.self_attn.v_proj.weight.zero_()
        together = model(ids).logits
        alone = [model(part).logits for part in ids.split([6, 7], dim=1)]
        torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-12)
        ids[0, 5] = 6
        assert not torch.allclose(model(ids).logits[:, 6:], together[:, 6:])


def test_a_memory_reads_the_stream_before_attention_and_is_added_to_it(engram, ids):
    model = engram()
    seen = {}

    def note(name):
        return lambda _, given, answer: seen.update({name: (given[0], answer)})

    block = model.model.layers[2]
    block.memories[0].register_forward_hook(note("memory"))
    block.input_layernorm.register_forward_hook(note("norm"))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    read, answer = seen["memory"]
    assert torch.equal(read, output.hidden_states[2])
    assert torch.equal(seen["norm"][0], read + answer.hidden)
    assert [float(stats["tokens"]) for stats in output.memory_stats] == [24.0, 24.0]
    assert len(output.ffn_stats) == 3


def test_several_memories_answer_in_the_order_of_the_stream(make, rules, ids):
    """Each with what it asks for, and their statistics in that order; usage names them apart."""
    rule = rules["rule"]
    memory = [
        rule("PerLayerEmbedding", [1], d_row=5),
        rule("L3", "all"),
        rule("Engram", 1, **SMALL),
    ]
    model = skewed(make(memory=memory).double())
    seen = []
    for _, layer in model.model.added_layers():
        layer.register_forward_pre_hook(
            lambda layer, given, options: seen.append((layer, given[0], options)), with_kwargs=True
        )
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    names = [type(layer).__name__ for layer, _, _ in seen]
    behind = ["DenseFFN", "PerLayerEmbedding"]
    assert names == ["L3", "DenseFFN", "L3", "Engram", *behind, "L3", "DenseFFN"]
    layer, read, options = seen[5]
    assert torch.equal(options["embeddings"], model.model.embed_tokens(ids))
    with torch.no_grad():
        assert torch.equal(read + layer(read, **options).hidden, output.hidden_states[2])
    assert [len(output.ffn_stats), len(output.memory_stats)] == [3, 5]
    counts = [stats["expert_counts"].numel() for stats in output.memory_stats]
    hashed = model.model.layers[1].memories[1].hash.total_rows
    assert counts == [244, 244, hashed, 61, 244]
    assert list(routed_by_name(model))[:2] == ["layer 0, memory 0", "layer 1, memory 0"]
    torch.testing.assert_close(
        stepped(model, ids, torch.ones_like(ids), [7, 8, 12], None),
        output.logits,
        rtol=1e-10,
        atol=1e-12,
    )


def test_memories_of_a_model_have_hash_functions_of_their_own(engram, ids, tmp_path):
    model = engram()
    first, second = (layer for _, layer in model.model.added_layers() if hasattr(layer, "hash"))
    assert not {*first.hash.sizes} & {*second.hash.sizes}
    assert (first.d_ff, first.convolution, first.vocab_size) == (0, True, 61)
    assert not any(".memories.0.ffn" in name for name in model.state_dict())
    save_checkpoint(tmp_path / "model", model)
    again, _ = load_checkpoint(tmp_path / "model")
    assert again.config.memory == model.config.memory
    assert [layer.hash.sizes for layer in (first, second)] == [
        layer.hash.sizes for _, layer in again.model.added_layers() if hasattr(layer, "hash")
    ]
    with torch.no_grad():
        assert torch.equal(again.double()(ids).logits, model(ids).logits)


def test_every_parameter_learns(engram, ids):
    model = engram().train()
    model(ids, labels=ids).loss.backward()
    names = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert names == []
    assert sum(".memories." in name for name, _ in model.named_parameters()) == 14


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"layers": 1}, r"^memory: \{'layers': 1\} is not a list of rules"),
        (["x"], r"^memory\[0\]: 'x' is not a rule"),
        ([{"layers": 3, "class_path": "Engram"}], r"^memory\[0\]: layers: there is no layer 3"),
        ([{"class_path": "Engram"}], r"^memory\[0\]: layers is missing"),
        ([{"layers": 1, "class_path": "Engrm"}], r"memory\[0\]: class_path: no layer 'Engrm'.*Eng"),
        (
            [{"layers": 1, "class_path": "SparseMoE"}],
            r"^memory\[0\]: class_path: SparseMoE takes the place of .*moezoo.Engram",
        ),
        (
            [{"layers": 1, "class_path": "Engram", "router_input": "pre_attention"}],
            r"^memory\[0\]: router_input: a memory has no router",
        ),
        (
            [{"layers": 1, "class_path": "Engram", "init_args": {"num_row": 3}}],
            r"^memory\[0\]: Engram: unknown argument 'num_row'.*num_rows",
        ),
        (
            [{"layers": 1, "class_path": "Engram", "init_args": {"vocab_size": 9}}],
            r"^memory\[0\]: Engram has vocab_size 9, the model 61",
        ),
    ],
)
def test_what_is_no_memory_is_named(make, memory, message):
    with pytest.raises(InputError, match=message):
        make(memory=memory)


def test_a_layer_that_reads_a_history_wants_it(engram, ids):
    layer = engram().model.layers[0].memories[0]
    assert isinstance(layer, FeedForward)
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    with pytest.raises(InputError, match="history: the convolution reads values of earlier"):
        layer(hidden, token_ids=ids)


def test_a_model_without_memories_is_as_before():
    config = MoezooConfig(**SIZES)
    assert config.memory == []
    assert MoezooConfig.from_dict(config.to_dict()).memory == []
