"""Hash tables are built once, from the data or a baseline, and then belong to the model."""

import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moezoo import HashLayer, InputError
from moezoo.routing import hashing
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.generate import continue_text
from moezoo_train.data import prepared
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.run import hash_tables

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with documents of a few frequent words and many rare ones."""
    folder = tmp_path_factory.mktemp("hash")
    (folder / "corpus").mkdir()
    generator = random.Random(0)
    for number in range(20):
        words = [str(int(generator.paretovariate(0.7)) % 500) for _ in range(80)]
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def fit(folder, make_short_runs):
    """Return a function that runs `moezoo fit` with a hash layer."""
    train = make_short_runs(folder, warmup_steps=2)

    def fit(name: str, hash_function: str, **options) -> Path:
        layer = {"num_experts": 4, "vocab_size": 300, "hash_function": hash_function}
        return train(name, {"ffn": {"class_path": "moezoo.HashLayer", "init_args": layer}}, options)

    return fit


@pytest.fixture(scope="module")
def balanced(fit) -> Path:
    """Return the finished run of a balanced hash layer."""
    return fit("balanced", "balanced")


def tables(run: Path) -> list[torch.Tensor]:
    model, _ = load_checkpoint(run / "model")
    return [layer.mlp.table for layer in model.model.layers]


def state(run: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return saved["state_dict"]


def test_balanced_tables_follow_the_training_tokens(balanced, folder):
    data = prepared.PreparedData.load(folder / "data")
    counts = torch.zeros(300, dtype=torch.int64)
    for token in data.tokens("train"):
        counts[int(token)] += 1
    expected = hashing.balanced_table(counts, 4)
    for table in tables(balanced):
        assert torch.equal(table[0, :300], expected)


def test_a_saved_model_generates(balanced):
    model, tokenizer = load_checkpoint(balanced / "model")
    assert len(continue_text(model, tokenizer, "12 ", max_new_tokens=9)) > 0


def test_a_resumed_run_takes_the_table_from_its_checkpoint(fit, balanced, folder, monkeypatch):
    fit("parts", "balanced", **{"trainer.max_steps": 2})

    def counted(self) -> None:
        raise AssertionError("a resumed run must not count")

    monkeypatch.setattr(TokenDataModule, "token_counts", counted)
    resumed = fit("parts", "balanced", ckpt_path="last")
    whole = state(balanced)
    assert any(name.endswith("mlp.table") for name in whole)
    for name, tensor in state(resumed).items():
        assert torch.equal(tensor, whole[name]), name
    columns = ("step", "train/loss", "train/grad_norm", "val/loss")
    rows = [
        [[row.get(c) for c in columns] for row in read_metrics(path / "metrics.csv")]
        for path in (resumed, balanced)
    ]
    at_its_end = rows[0].pop(2)  # the first part was validated, as every run is at its end
    assert at_its_end[0] == "2"
    assert at_its_end[3] is not None
    assert rows[0] == rows[1]


def test_weights_taken_over_bring_their_table(fit, balanced, monkeypatch):
    monkeypatch.setattr(TokenDataModule, "token_counts", None)
    started = fit("started", "random", **{"model.initialize_from": balanced / "model"})
    for table, other in zip(tables(started), tables(balanced), strict=True):
        assert torch.equal(table, other)


@pytest.mark.parametrize("kind", ["clustered", "dispersed"])
def test_tables_follow_the_embeddings_of_a_baseline(fit, balanced, kind):
    baseline, _ = load_checkpoint(balanced / "model")
    finished = fit(kind, kind, **{"model.hash_embeddings_from": balanced / "model"})
    make = {"clustered": hashing.clustered_table, "dispersed": hashing.dispersed_table}[kind]
    weight = baseline.model.embed_tokens.weight
    expected = make(weight, 4, torch.Generator().manual_seed(0))
    assert len(expected.unique()) == 4
    for table in tables(finished):
        assert torch.equal(table[0, :300], expected)


def test_a_baseline_that_does_not_fit_is_one_line(fit, balanced, folder, tmp_path):
    option = "model.hash_embeddings_from"
    small, foreign = tmp_path / "small", tmp_path / "foreign"
    fit("small", "random", **{"data.vocab_size": 290, "data.data_dir": tmp_path / "data"})
    shutil.copytree(balanced / "model", foreign)
    for file in (folder / "small" / "model").glob("token*"):
        shutil.copy(file, foreign)
    cases = [
        ({}, f"{option}: missing; clustered and dispersed"),
        ({option: tmp_path / "nowhere"}, rf"{option}: .*nowhere does not exist"),
        ({option: folder / "small" / "model"}, f"{option}: .* has 290 tokens, the data has 300"),
        ({option: foreign}, f"{option}: .*foreign has another tokenizer than the data; prepare"),
        (
            {option: balanced / "model", "model.ffn.vocab_size": 400},
            r"model\.ffn\.vocab_size: .* room for 400 tokens, .* set it to 300",
        ),
    ]
    assert not small.exists()
    for options, message in cases:
        with pytest.raises(InputError, match=message) as error:
            fit("mistake", "clustered", **options)
        assert "\n" not in str(error.value)
        assert not (folder / "mistake" / "model").exists()


def test_counting_is_exact_whatever_is_read_at_once(balanced, folder, monkeypatch):
    data = prepared.PreparedData.load(folder / "data")
    whole = np.bincount(data.tokens("train"), minlength=data.vocab_size)
    monkeypatch.setattr(prepared, "_COUNTED_AT_ONCE", 97)
    assert np.array_equal(data.token_counts("train"), whole)
    assert whole.sum() == data.train.tokens
    module = TokenDataModule(source=None, data_dir=str(folder / "data"))
    module.vocab_size = 310  # a larger model's
    assert module.token_counts().tolist() == [*whole.tolist(), *[0] * 10]


def test_an_id_outside_the_vocabulary_is_named(balanced, folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    tokens = np.memmap(tmp_path / "data" / "train.bin", dtype="<u2", mode="r+")
    tokens[3] = 300
    tokens.flush()
    data = prepared.PreparedData.load(tmp_path / "data")
    with pytest.raises(InputError, match=r"train\.bin holds id 300, outside its vocabulary of 300"):
        data.token_counts("train")


def test_every_process_gets_the_first_ones_table():
    """Another process's result is thrown away, be it rounded differently."""
    counts = torch.arange(50)
    layers = [
        HashLayer(8, num_experts=4, vocab_size=50, hash_function="balanced") for _ in range(2)
    ]
    build = partial(
        hash_tables.build_hash_tables, token_counts=lambda: counts, embeddings=lambda: counts
    )
    build(layers[0], agreed=lambda own: own)
    build(layers[1], agreed=lambda own: (layers[0].table + 1) % 4)
    assert torch.equal(layers[0].table[0, :50], hashing.balanced_table(counts, 4))
    assert torch.equal(layers[1].table, (layers[0].table + 1) % 4)
    assert layers[1](torch.randn(3, 8), token_ids=torch.arange(3)).hidden.isfinite().all()


def test_layers_that_have_a_table_ask_for_nothing(make_model, make_trainer, random_tokens):
    options = {"num_experts": 4, "d_expert": 8, "vocab_size": 50}
    make_trainer(max_steps=1).fit(make_model(ffn=partial(HashLayer, **options)), random_tokens)
    model = make_model(ffn=partial(HashLayer, hash_function="balanced", **options))
    with pytest.raises(InputError, match=r"data: it has no token_counts\(\) for the balanced hash"):
        make_trainer(max_steps=1).fit(model, random_tokens)
