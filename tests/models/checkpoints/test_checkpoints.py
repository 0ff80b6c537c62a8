"""Checkpoints: exact round trips, whole or not at all, and every damage named."""

import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from moezoo import InputError
from moezoo_models import MoezooForCausalLM, MoezooModel
from moezoo_models.checkpoints import atomic
from moezoo_models.checkpoints.directory import (
    load_checkpoint,
    load_with_tokenizer,
    save_checkpoint,
)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Compare all parameters and buffers, saved or not, bit for bit."""
    for listing in ("named_parameters", "named_buffers"):
        tensors, others = dict(getattr(one, listing)()), dict(getattr(other, listing)())
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype, name
            assert torch.equal(tensor, others[name]), name


@pytest.fixture
def model(make, rules):
    """A model with buffers of both kinds whose values differ from fresh ones."""
    bias = rules["rule"]("SparseMoE", 2, num_experts=4, router={"selection_bias": True})
    built = make(ffn=[*rules["mixed"], bias])
    built.model.layers[1].mlp.table.random_(7)
    built.model.layers[2].mlp.observe({"expert_counts": torch.tensor([9.0, 1, 1, 1])})
    built.model.layers[2].mlp.step()
    return built


@pytest.fixture
def saved(tmp_path, model):
    return save_checkpoint(tmp_path / "checkpoint", model)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"qk_norm": True}])
def test_round_trip_is_exact(make, rules, ids, tmp_path, fields):
    model = make(ffn=rules["mixed"], **fields)
    model.model.layers[1].mlp.table.random_(7)
    save_checkpoint(tmp_path / "c", model)
    loaded, tokenizer = load_checkpoint(tmp_path / "c")
    assert tokenizer is None
    assert not loaded.training
    assert_same(loaded, model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_buffers_that_learn_are_saved(model, saved):
    assert model.model.layers[2].mlp.gate.selection_bias.abs().max() > 0
    assert_same(load_checkpoint(saved)[0], model)


def test_auto_classes_load_it(model, saved, ids):
    assert_same(AutoModelForCausalLM.from_pretrained(saved), model)
    decoder = AutoModel.from_pretrained(saved)
    assert isinstance(decoder, MoezooModel)
    assert_same(decoder, model.model)


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    load_checkpoint(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_round_trip_keeps_fp32_buffers(make, rules, tmp_path):
    model = make(ffn=rules["mixed"]).bfloat16()
    save_checkpoint(tmp_path / "c", model)
    loaded, _ = load_checkpoint(tmp_path / "c")
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_shards_with_an_index(model, tmp_path):
    save_checkpoint(tmp_path / "c", model, max_shard_size="20KB")
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert_same(load_checkpoint(tmp_path / "c")[0], model)
    missing = tmp_path / "c" / sorted(files)[1]
    missing.unlink()
    with pytest.raises(InputError, match=f"{missing.name} is missing, but .*index.json names it"):
        load_checkpoint(tmp_path / "c")


def test_no_class_is_imported_from_a_checkpoint(saved):
    config = json.loads((saved / "config.json").read_text())
    config["ffn"][0]["class_path"] = "antigravity.Layer"
    (saved / "config.json").write_text(json.dumps(config))
    for load in (load_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"no layer 'antigravity.Layer'"):
            load(saved)
    assert "antigravity" not in sys.modules


def damage(directory, kind):
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    config = json.loads((directory / "config.json").read_text())
    if kind == "truncated":
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 100)
    elif kind == "cut in its header":
        with weights.open("r+b") as file:
            file.truncate(20)
    elif kind == "not safetensors":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif kind == "missing tensors":
        save_file({name: t for name, t in tensors.items() if "layers.1" not in name}, weights)
    elif kind == "foreign tensors":
        save_file(tensors | {"a": torch.ones(1), "b": torch.ones(1)}, weights)
    elif kind == "other config":
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    elif kind == "fewer layers":
        changes = {"num_hidden_layers": 2, "layer_types": None, "ffn": config["ffn"][:2]}
        (directory / "config.json").write_text(json.dumps(config | changes))
    elif kind == "pickled":
        torch.save(tensors, directory / "pytorch_model.bin")
        weights.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "broken config":
        (directory / "config.json").write_text('{"model_type": ')
    elif kind == "unknown field":
        (directory / "config.json").write_text(json.dumps(config | {"hidden_sise": 3}))
    elif kind == "foreign architecture":
        (directory / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    elif kind == "no config":
        (directory / "config.json").unlink()
    elif kind == "nothing":
        shutil.rmtree(directory)
    elif kind == "a file":
        shutil.rmtree(directory)
        directory.write_text("text")
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"model\.safetensors is truncated or damaged \(.*copy or save it again"),
        ("cut in its header", r"model\.safetensors is truncated or damaged"),
        ("not safetensors", r"model\.safetensors is truncated or damaged"),
        (
            "missing tensors",
            r"num_hidden_layers: 3, but no tensor of layer 1 is in the weights",
        ),
        ("foreign tensors", r"'a' is not a tensor of this model \(and 1 more tensors differ\)"),
        (
            "other config",
            r"'model.embed_tokens.weight' has shape \(61, 32\), by config.json \(50, 3",
        ),
        ("fewer layers", r"'model.layers.2.* is not a tensor of this model \(and"),
        ("pickled", r"pytorch_model.bin would have to be unpickled.*convert it to safetensors"),
        ("no weights", r"holds neither model.safetensors nor model.safetensors.index.json"),
        ("broken config", r"config.json cannot be read: "),
        ("unknown field", r"hidden_sise: no such field; did you mean 'hidden_size'"),
        ("foreign architecture", r"model_type: 'mamba' cannot be loaded"),
        ("no config", r"holds no config.json"),
        ("nothing", r"checkpoint: .* does not exist; give a directory with config.json"),
        ("a file", r"checkpoint: .* is a file; give a directory with config.json"),
    ],
)
def test_damage_is_named(saved, kind, message):
    damage(saved, kind)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_a_run_directory_hints_at_its_model(saved):
    run = saved.parent / "run"
    run.mkdir()
    saved.rename(run / "model")
    with pytest.raises(InputError, match=r"holds no config.json; did you mean .*run/model\?"):
        load_checkpoint(run)


def test_missing_tensors_are_an_error_in_transformers_own_loading_too(saved):
    damage(saved, "missing tensors")
    for auto in (AutoModelForCausalLM, AutoModel, MoezooForCausalLM):
        with pytest.raises(InputError, match=r"no tensor of layer 1 is in the weights"):
            auto.from_pretrained(saved)


def test_a_tokenizer_is_needed_for_text(saved, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_with_tokenizer(saved)
    with pytest.raises(InputError, match=r"tokenizer: .* is not a directory"):
        load_with_tokenizer(saved, tmp_path / "none")


def listing(directory):
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))


def test_saving_replaces_the_whole_directory(model, saved, tmp_path):
    (saved / "stale.txt").write_text("of the old one")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save_checkpoint(saved, model)
    assert_same(load_checkpoint(saved)[0], model)
    assert listing(tmp_path) == [
        "checkpoint",
        "checkpoint/config.json",
        "checkpoint/generation_config.json",
        "checkpoint/model.safetensors",
    ]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_save_leaves_the_old_one(model, saved, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    before = {name: (tmp_path / name).read_bytes() for name in listing(saved.parent)[1:]}

    class FullDisk:
        def save(self, directory):
            (directory / "tokenizer.model").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, model, FullDisk())
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)[1:]} == before
    save_checkpoint(saved, model)
    save_checkpoint(tmp_path / "new", model)
    assert len(listing(tmp_path)) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging directories is Linux's")
def test_directories_are_exchanged_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange directories")
    assert listing(tmp_path) == ["a", "a/b", "b", "b/a"]


def test_without_exchange_a_failed_rename_is_undone(model, saved, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename = type(saved).rename

    def broken(path, target):
        if ".new-" in path.name:
            raise OSError("no rename today")
        return rename(path, target)

    monkeypatch.setattr(type(saved), "rename", broken)
    with pytest.raises(OSError, match="no rename today"):
        save_checkpoint(saved, model)
    assert_same(load_checkpoint(saved)[0], model)


def test_what_is_no_checkpoint_is_not_replaced(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis holds something that is no checkpoint"):
        save_checkpoint(tmp_path / "thesis", model)
    with pytest.raises(InputError, match=r"chapter.tex is a file; give a directory"):
        save_checkpoint(tmp_path / "thesis" / "chapter.tex", model)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert_same(load_checkpoint(save_checkpoint(tmp_path / "empty", model))[0], model)


def test_progress_bars_are_kept_off_the_screen(model, tmp_path, capfd):
    load_checkpoint(save_checkpoint(tmp_path / "c", model))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
