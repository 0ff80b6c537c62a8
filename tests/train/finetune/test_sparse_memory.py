"""Sparse memory finetuning: the rows that are chosen are trained, and nothing else is."""

from __future__ import annotations

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moezoo import PEER, DenseFFN, InputError, MemoryPlus, ProductKeyMemory
from moezoo.routing.query_network import QueryNetwork
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.prepare import prepare
from moezoo_train.data.windows import TrainBatches
from moezoo_train.finetune.background import Background, count_background, inspect_background
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.finetune.slot_counts import memory_tables
from moezoo_train.finetune.sparse_memory import SparseMemoryOptions, best_rows, slot_scores
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run import cli
from moezoo_train.run.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

ROWS, VOCABULARY = 7, 50
SIZES = {"num_heads": 2, "top_k": 3}
LAYERS = {
    "memory_plus": partial(MemoryPlus, num_keys=8, value_pool="m", **SIZES),
    "product_key_memory": partial(ProductKeyMemory, num_keys=8, **SIZES),
    "peer": partial(PEER, num_experts=64, gated=True, **SIZES),
}
SGD = OptimizerConfig("sgd", lr=0.5)


@pytest.fixture
def start(make_model, tmp_path):
    """Return a function that gives the directory of a trained model of a layer of LAYERS."""

    def make(name: str) -> str:
        model = make_model(ffn=LAYERS.get(name, DenseFFN)).model
        for query in (m for m in model.modules() if isinstance(m, QueryNetwork)):
            if query.norm == "batch":
                query.running_mean.uniform_(-0.1, 0.1)
        save_checkpoint(tmp_path / name, model, None)
        return str(tmp_path / name)

    return make


def tune(start: str, rows: int = ROWS, **arguments) -> LanguageModel:
    """Build a model that is to be tuned on from a directory."""
    settings = {
        "sparse_memory": SparseMemoryOptions(rows),
        "optimizer": SGD,
        "schedule": ScheduleConfig("constant", warmup_steps=0),
    }
    return LanguageModel(VOCABULARY, initialize_from=start, **(settings | arguments))


class Watch(pl.Callback):
    """Keeps the parameters before each step, and the rows of the gradients that are clipped."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.rows: list[dict[str, torch.Tensor]] = []

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        self.before.append({n: p.detach().clone() for n, p in module.named_parameters()})

    def on_after_backward(self, trainer, module) -> None:
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name

    def see(self, module) -> None:
        found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert all(gradient.is_sparse for gradient in found.values())
        self.rows.append({n: g.coalesce().indices()[0].clone() for n, g in found.items()})


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).any(-1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_changes_the_chosen_rows_and_nothing_else(
    name, optimizer, start, make_trainer, random_tokens, monkeypatch
):
    model = tune(start(name), optimizer=OptimizerConfig(optimizer, lr=0.1))
    watch = Watch()
    clip = LanguageModel.configure_gradient_clipping

    def seeing(self, *args, **kwargs) -> None:
        watch.see(self)
        clip(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", seeing)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    make_trainer(max_steps=3, callbacks=[watch], gradient_clip_val=1.0).fit(model, random_tokens)

    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert len(watch.rows) == 3
    tables = {"memory_plus": 1, "product_key_memory": 2, "peer": 6}[name]
    for step, (old, new) in enumerate(zip(watch.before, [*watch.before[1:], after], strict=True)):
        rows = watch.rows[step]
        assert len(rows) == tables
        assert all(len(found) == ROWS for found in rows.values())
        for parameter in old:
            expected = rows.get(parameter)
            changed = [] if expected is None else expected.tolist()
            assert (old[parameter] != new[parameter]).any() == bool(changed), parameter
            if changed:
                assert changed_rows(old[parameter], new[parameter]) == changed
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())


def test_what_is_computed_is_the_same_with_and_without(start, make_trainer, random_tokens):
    directory = start("memory_plus")
    seen = []
    for sparse in (SparseMemoryOptions(1), None):
        model = tune(directory, sparse_memory=sparse)
        first: list[torch.Tensor] = []
        model.model.model.register_forward_hook(
            lambda m, a, output, to=first: to.append(output.last_hidden_state)
        )
        make_trainer(max_steps=1).fit(model, random_tokens)
        seen.append(first[0])
    assert torch.equal(*seen)


def test_the_rows_are_those_that_the_formula_picks(start, make_trainer, random_tokens, tmp_path):
    """Two layers read one pool, two micro-batches make a step, some labels are ignored."""
    directory = start("memory_plus")
    plain, _ = load_checkpoint(directory)
    windows = TrainBatches(torch.arange(900).numpy() % VOCABULARY, 4, 1, seed=1)
    background = count_background(plain.float(), windows, 5)
    background.save(tmp_path / "b.safetensors")
    batches = list(random_tokens.train_dataloader())[:2]
    for batch in batches:
        batch["labels"][:, 5:] = -100
    seen: list[torch.Tensor] = []
    for block in plain.model.layers:
        block.mlp.memory.keys.register_forward_hook(lambda m, a, out: seen.append(out[1]))
    for batch in batches:
        plain(input_ids=batch["input_ids"])
    assert len(seen) == 4
    read = torch.cat([slots_THK.unflatten(0, (4, 12))[:, :5].flatten() for slots_THK in seen])
    counts = torch.bincount(read, minlength=64)
    (frequency,) = background.frequency.values()
    scores = counts / counts.sum() * torch.log(6 / (frequency + 1))
    assert (scores > 0).sum() > ROWS
    assert (scores[counts > 0] == 0).any()
    expected = set(scores.topk(ROWS).indices.tolist())
    assert expected != set(counts.topk(ROWS).indices.tolist())

    options = SparseMemoryOptions(ROWS, str(tmp_path / "b.safetensors"))
    model = tune(directory, sparse_memory=options, activation_checkpointing=True)
    (table,) = memory_tables(model.model).values()
    before = table.weight.detach().clone()
    loader = DataLoader(batches, batch_size=None)
    make_trainer(max_steps=1, accumulate_grad_batches=2).fit(model, loader, loader)
    assert set(changed_rows(before, table.weight)) == expected


def test_scores_by_hand():
    counts = torch.tensor([3, 1, 0, 4])
    frequency = torch.tensor([10, 0, 0, 4])
    scores = slot_scores(counts, frequency, 10)

    wanted = [0.0, math.log(11) / 8, 0.0, math.log(11 / 5) / 2]
    torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64))
    assert scores[0] == 0.0
    assert best_rows(scores, 1).tolist() == [False, False, False, True]
    assert best_rows(scores, 3).tolist() == [False, True, False, True]
    assert best_rows(slot_scores(counts), 2).tolist() == [True, False, False, True]


def test_background_counts_batches_and_comes_back(start, tmp_path):
    directory = start("peer")
    model, _ = load_checkpoint(directory)
    one = TrainBatches(torch.arange(400).numpy() % VOCABULARY, 12, 2, seed=1)
    twice = count_background(model.float(), one, 2)
    alone = count_background(model, one, 1)

    for name, frequency in twice.frequency.items():
        assert frequency.max() <= 2
        assert set(alone.frequency[name].tolist()) == {0, 1}
        assert (frequency >= alone.frequency[name]).all()
        assert frequency.sum() > alone.frequency[name].sum()
    twice.save(tmp_path / "file.safetensors")
    back = Background.load(tmp_path / "file.safetensors", model)
    assert (back.batches, back.sequence_length, back.batch_size) == (2, 12, 2)
    assert all(torch.equal(back.frequency[n], f) for n, f in twice.frequency.items())
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(InputError, match="counted with other weights"):
        Background.load(tmp_path / "file.safetensors", model)


def test_from_the_command_line_it_runs_and_resumes_exactly(
    corpus, directory, command, make_model, tmp_path, capsys
):
    tokenizer = directory("llama")
    prepare(str(corpus), tmp_path / "data", tokenizer=str(tokenizer))
    model = make_model(ffn=partial(MemoryPlus, num_keys=8, **SIZES), vocab_size=300).model
    save_checkpoint(start := tmp_path / "start", model, load_tokenizer(tokenizer))
    inspect_background(start, tmp_path / "data", tmp_path / "b.safetensors", 3, 16, 2)
    assert "rows read by 3 batches" in capsys.readouterr().out
    options = {
        "model.sparse_memory.rows": 5,
        "model.sparse_memory.background": tmp_path / "b.safetensors",
        "model.optimizer.name": "sgd",
    }
    cli.run(command("whole", start, **options))
    cli.run(command("parts", start, **options, **{"trainer.max_steps": 4}))
    resumed = command("parts", start, **options, ckpt_path="last")
    cli.run(resumed)

    whole, _ = load_checkpoint(tmp_path / "whole" / "model")
    parts, _ = load_checkpoint(tmp_path / "parts" / "model")
    old, _ = load_checkpoint(start)
    states = [model.state_dict() for model in (whole, parts, old)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    moved = {n for n in states[0] if not torch.equal(states[0][n], states[2][n])}
    assert moved == {f"model.layers.{i}.mlp.memory.values.weight" for i in (0, 1)}
    with pytest.raises(InputError, match=r"sparse_memory.rows is 5 in the checkpoint, but 6"):
        cli.run([*resumed, "--model.sparse_memory.rows=6", "--trainer.max_steps=8"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dense", {}, "sparse_memory: .* has no table of values"),
        ("peer", {"lora": LoRAOptions()}, "set it or lora to null"),
        ("peer", {"optimizer": OptimizerConfig("muon")}, "optimizer.name: muon"),
        ("peer", {"compile": True}, "compile: "),
        (
            "peer",
            {"sparse_memory": SparseMemoryOptions(background="nowhere")},
            "sparse_memory.background: there is no file nowhere",
        ),
    ],
)
def test_mistakes(name, changes, message, start):
    with pytest.raises(InputError, match=message):
        tune(start(name), **changes)


def test_without_a_trained_model_and_with_no_rows_it_is_refused(make_model):
    with pytest.raises(InputError, match="set initialize_from"):
        make_model(sparse_memory=SparseMemoryOptions())
    with pytest.raises(InputError, match=r"sparse_memory\.rows: 0"):
        SparseMemoryOptions(rows=0)


def test_a_file_of_another_kind_is_refused(start, tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is damaged"):
        Background.load(tmp_path / "x")
    with pytest.raises(InputError, match="is not by `moezoo inspect background`"):
        Background.load(next((tmp_path / start("peer")).glob("*.safetensors")))
