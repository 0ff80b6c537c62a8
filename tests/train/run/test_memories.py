"""Runs with memories beside the blocks: classes of tokens, resuming, export, a plan."""

from pathlib import Path

import pytest
import torch

from moezoo import InputError
from moezoo.routing.ngram import text_classes
from moezoo.routing.row_allocation import frequent_rows, word_rows
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.export.stock import export_stock
from moezoo_models.text.classes import token_classes
from moezoo_train.data.prepared import PreparedData
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.throughput import count_parameters, ffn_layers, forward_flops_per_token
from moezoo_train.plan.trace import _kinds
from moezoo_train.run import hash_tables
from moezoo_train.run.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
MEMORY = {
    "layers": [0, 1],
    "class_path": "moezoo.Engram",
    "init_args": {"num_heads": 2, "num_rows": 50, "compression": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memories")
    (folder / "corpus").mkdir()
    for number in range(12):
        text = f"Word {number} WORD word a A b  c " * 12
        (folder / "corpus" / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def fit(folder, make_short_runs):
    """Return a function that runs `moezoo fit` with two memories."""
    train = make_short_runs(folder, warmup_steps=1)

    def fit(name: str, memory=MEMORY, **options) -> Path:
        return train(name, {"memory": memory}, options)

    return fit


@pytest.fixture(scope="module")
def whole(fit) -> Path:
    return fit("whole")


def test_the_classes_are_those_of_the_runs_tokenizer_and_are_saved(whole):
    model, tokenizer = load_checkpoint(whole / "model")
    memories = [layer for _, layer in model.model.added_layers() if hasattr(layer, "hash")]
    assert len(memories) == 2
    expected = token_classes(tokenizer, 300)
    assert len(expected.unique()) < 295
    for layer in memories:
        assert layer.missing_input is None
        assert torch.equal(layer.hash.compressed[:-1], expected)
    assert memories[0].hash.multipliers.tolist() != memories[1].hash.multipliers.tolist()
    rows = read_metrics(whole / "metrics.csv")
    assert float(rows[0]["experts/usage/memory_01"]) > 0
    assert not any(name.startswith("experts/usage/layer") for name in rows[0])


def test_a_resumed_run_takes_the_classes_from_its_checkpoint(fit, whole, monkeypatch):
    fit("parts", **{"trainer.max_steps": 2})

    def read(*_) -> None:
        raise AssertionError("a resumed run must not read its tokenizer for them")

    monkeypatch.setattr(hash_tables, "token_classes", read)
    resumed = fit("parts", ckpt_path="last")
    ours, theirs = (
        torch.load(each / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for each in (resumed, whole)
    )
    assert any("memories.0.hash.compressed" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    other = {**MEMORY, "init_args": {**MEMORY["init_args"], "gate": False}}
    with pytest.raises(InputError, match=r"ckpt_path: model.memory\[0\].init_args.gate is True"):
        fit("parts", memory=other, ckpt_path="last")


def test_rows_of_tokens_follow_the_training_tokens(fit, folder):
    l3 = {"class_path": "moezoo.L3", "init_args": {"allocation": "words", "max_rows": 3}}
    counted = {**l3, "init_args": {"allocation": "frequency", "num_rows": 500}}
    per_layer = {"layers": "all", "class_path": "moezoo.PerLayerEmbedding"}
    memory = [{"layers": 0, **l3}, {"layers": 1, **counted}, per_layer]
    output = fit("rows", memory=memory, **{"trainer.max_steps": 1})
    model, tokenizer = load_checkpoint(output / "model")
    names = [type(layer).__name__ for _, layer in model.model.added_layers()]
    assert names == ["DenseFFN", "L3", "PerLayerEmbedding"] * 2
    in_turn = [type(layer).__name__ for layer in ffn_layers(model)]  # as are their statistics
    assert in_turn == ["DenseFFN"] * 2 + ["L3", "PerLayerEmbedding"] * 2
    data = PreparedData.load(folder / "data")
    tokens = torch.from_numpy(data.tokens("train").astype("int64"))
    words, frequent = (model.model.layers[n].memories[0].starts.diff() for n in range(2))
    expected = word_rows(tokens.tolist(), 300, 900, 3, tokenizer.eos_id)
    assert torch.equal(words, expected)
    assert torch.equal(frequent, frequent_rows(torch.bincount(tokens, minlength=300), 500, 8))
    rows = read_metrics(output / "metrics.csv")
    assert [float(rows[0][f"experts/usage/memory_0{n}"]) > 0 for n in range(4)] == [True] * 4


def test_costs_of_memories_count():
    memory = {"layers": [1], "class_path": "moezoo.PerLayerEmbedding"}
    with torch.device("meta"):
        sizes = {"vocab_size": 50, "d_model": 16, "num_layers": 3, "num_heads": 2}
        plain, module = (LanguageModel(**sizes, memory=rule).model for rule in (None, memory))
        cost = module.model.layers[1].memories[0].cost()
    more = [a - b for a, b in zip(count_parameters(module), count_parameters(plain), strict=True)]
    assert more == [cost.total_parameters, cost.active_parameters]
    flops = [forward_flops_per_token(each, 8) for each in (module, plain)]
    assert flops[0] - flops[1] == cost.flops_per_token
    assert _kinds(module) == [[0, 2], [1]]


def test_a_stock_model_has_no_memories(whole, folder):
    with pytest.raises(InputError, match=r"layer 0 has Engram beside its block .* --with_code"):
        export_stock(whole / "model", folder / "stock")
    assert not (folder / "stock").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, r"model.memory\[0\]: layers: there is no layer 2"),
        ({"class_path": "moezoo.PEER"}, r"model.memory\[0\]: class_path: PEER takes the place"),
        ({"init_args": {"num_rws": 5}}, r"model.memory\[0\]: Engram: unknown argument 'num_rws'"),
        ({"init_args": {"index": -1}}, r"model.memory\[0\]: index: -1 is out of range"),
    ],
)
def test_mistakes_are_named_by_their_key(fit, folder, change, message):
    with pytest.raises(InputError, match=message):
        fit("wrong", memory={**MEMORY, **change})
    assert not (folder / "wrong").exists()


def test_data_without_a_tokenizer_cannot_say_what_reads_alike(whole):
    model, _ = load_checkpoint(whole / "model")
    hash_tables.build_token_classes(model, None, lambda found: found)  # nothing waits
    for layer in model.modules():
        if hasattr(layer, "missing_input"):
            layer.reset_parameters()
    with pytest.raises(InputError, match="data: it has no tokenizer, which compression wants"):
        hash_tables.build_token_classes(model, None, lambda found: found)
    with pytest.raises(InputError, match="compression: the classes of tokens are not there"):
        model(torch.arange(5)[None])


def test_classes_of_a_memory_without_compression_are_refused():
    from moezoo import Engram

    with pytest.raises(InputError, match="compression: this memory hashes tokens themselves"):
        Engram(16, vocab_size=2, num_rows=40).classify(text_classes(["a", "A"]))
