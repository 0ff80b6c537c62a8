"""`moezoo export` of a training checkpoint; those of several processes are tested beside them."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_train.checkpoint.export import export
from moezoo_train.data.train_tokenizer import train_tokenizer
from moezoo_train.run.cli import run

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from two_processes import MARKS, assert_same_directories, fit_arguments

pytestmark = MARKS


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a run whose blocks share a table of values."""
    folder = tmp_path_factory.mktemp("export")
    options = {
        "trainer.devices": 1,
        "sample_tokens": 0,
        "model.ffn": "moezoo.MemoryPlus",
        "model.ffn.num_keys": 8,
        "model.ffn.num_heads": 2,
        "model.ffn.top_k": 4,
        "model.ffn.value_pool": "values",
    }
    arguments = fit_arguments(folder, **options)
    run([argument for argument in arguments if "num_experts" not in argument])
    return folder / "run"


@pytest.fixture
def last(trained, tmp_path) -> Path:
    """Return a copy of its last checkpoint, alone, to damage."""
    (tmp_path / "checkpoints").mkdir()
    return Path(shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "checkpoints"))


def refused(path: Path, folder: Path, **options) -> str:
    """Return the message of a refusal, after which there is nothing."""
    with pytest.raises(InputError) as error:
        export(path, folder / "out", **options)
    assert [p.name for p in folder.iterdir() if "out" in p.name] == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_becomes_what_the_run_left(trained, tmp_path, capsys):
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    assert main(["export", checkpoint, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f" M parameters, {tmp_path / 'out'}\n")
    assert_same_directories(trained / "model", tmp_path / "out")


def test_the_optimizers_state_is_not_read(trained, last, tmp_path):
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["optimizer_states"] = []
    torch.save(checkpoint, last)
    export(last, tmp_path / "out", tokenizer=str(trained / "model"))
    assert_same_directories(trained / "model", tmp_path / "out")


def test_without_a_tokenizer_it_says_so(trained, last, tmp_path, capsys):
    export(last, tmp_path / "out")
    assert "no tokenizer" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_what_is_no_checkpoint_is_refused(last, tmp_path):
    assert refused(tmp_path / "no.ckpt", tmp_path).startswith("checkpoint: there is no ")
    other = tmp_path / "other.ckpt"
    other.write_text("something else")
    assert "is damaged or not a checkpoint" in refused(other, tmp_path)
    torch.save({"state_dict": {}}, other)
    assert refused(other, tmp_path).endswith("was not written by moezoo fit; name another")
    other.unlink()
    other.mkdir()
    assert "is incomplete, it has no rest.ckpt" in refused(other, tmp_path)
    assert "holds no config.json" in refused(tmp_path / "checkpoints", tmp_path)


def test_a_damaged_checkpoint_is_refused(last, tmp_path):
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:  # between its files there is padding
        largest = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    content[content.find(largest) + len(largest) // 2] ^= 1
    last.write_bytes(content)
    assert "is damaged or not a checkpoint" in refused(last, tmp_path)
    last.write_bytes(content[:-100])
    assert "is damaged or not a checkpoint" in refused(last, tmp_path)


def test_a_missing_tensor_is_refused(last, tmp_path):
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["state_dict"]["model.model.norm.weight"]
    torch.save(checkpoint, last)
    assert refused(last, tmp_path).startswith("checkpoint: tensor model.norm.weight is only in")


def test_nothing_is_unpickled(last, tmp_path):
    checkpoint = torch.load(last, weights_only=True)
    torch.save(checkpoint | {"more": Path()}, last)  # a class, which reading would call
    assert "is damaged or not a checkpoint" in refused(last, tmp_path)


def test_what_does_not_fit_is_refused(trained, last, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(InputError, match=r"target: .* is there already"):
        export(last, taken)
    train_tokenizer((f"{n} {n * n}" for n in range(3000)), tmp_path / "larger", 400)
    message = refused(last, tmp_path, tokenizer=str(tmp_path / "larger"))
    assert message.startswith("tokenizer: it has 400 tokens, the model 300")
    assert refused(trained / "model", tmp_path, base="x").startswith("base: is for training")


@pytest.mark.parametrize(
    ("path", "options", "fix"),
    [
        ("last.ckpt", {}, "export last.ckpt to one first, and then the directory"),
        ("model", {"format": "gguf"}, "leave it out, or format and the ending .gguf"),
        ("model", {"format": "stock"}, "leave it out, or format and the ending .gguf"),
    ],
)
def test_code_goes_with_directories_alone(path, options, fix, tmp_path):
    said = refused(Path(path), tmp_path, with_code=True, **options)
    assert said == f"with_code: is for directories of models; {fix}"
