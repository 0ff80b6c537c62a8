"""Dense checkpoints in torch's own format: read without running what they could contain."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.upcycle import upcycle


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def pickle_weights(directory, files=1):
    """Put torch's own files in the place of safetensors."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if files == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    index = {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        names = list(state)[number::files]
        index |= dict.fromkeys(names, file)
        # Parameters, as a module saves them; and not in the order of memory.
        part = {n: torch.nn.Parameter(state[n].t().contiguous().t()) for n in names}
        torch.save(part, directory / file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(text)


def weights(directory):
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


@pytest.mark.parametrize(("files", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_the_same_is_made_of_both_formats(files, dtype, readable, text, tmp_path):
    source = readable("llama_heads", dtype)
    upcycle(source, tmp_path / "one", experts=4)
    carve(source, tmp_path / "two", 1, 3, 6, sparsified=False, **text)
    pickle_weights(source, files)
    done = upcycle(source, tmp_path / "three", experts=4)
    assert done.exact
    assert done.drift["of"] == "logits"
    carve(source, tmp_path / "four", 1, 3, 6, sparsified=False, **text)
    assert weights(tmp_path / "three") == weights(tmp_path / "one")
    assert weights(tmp_path / "four") == weights(tmp_path / "two")


def test_safetensors_come_first(dense, tmp_path):
    source = dense()
    (source / "pytorch_model.bin").write_bytes(b"rubbish")
    assert upcycle(source, tmp_path / "out", experts=4).exact


@pytest.mark.parametrize("command", ["upcycle", "carve"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(command, zipped, readable, tmp_path, capsys):
    source = readable()
    pickle_weights(source)
    file, harm = source / "pytorch_model.bin", tmp_path / "harm"
    state = {**torch.load(file), "extra": Command(f"touch {harm}")}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main([command, str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    said = f"contains '{os.system.__module__}.system', and unpickling that could run any code"
    assert (said if zipped else "older than torch 1.6") in error
    assert error.startswith(f"moezoo: error: checkpoint: {file} ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    torch.load(file, weights_only=False)
    assert harm.exists()  # it would have been run


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "truncated": (truncate, "is truncated, damaged or older than torch 1.6"),
    "foreign": (lambda f: f.write_bytes(b"<html>"), "is truncated, damaged or older"),
    "list": (lambda f: torch.save([torch.ones(2)], f), "holds a list, not a state dict"),
    "nested": (
        lambda f: torch.save({"model": torch.load(f)}, f),
        "'model' in .* is no dense tensor; save a plain state dict",
    ),
    "sparse": (
        lambda f: torch.save({"model.norm.weight": torch.ones(32).to_sparse()}, f),
        r"'model\.norm\.weight' in .* is no dense tensor",
    ),
    "double": (
        lambda f: torch.save({n: t.double() for n, t in torch.load(f).items()}, f),
        "is F64; cast it to F32",
    ),
    "gone": (lambda f: f.unlink(), "holds neither"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_state_dict_is_refused_and_leaves_nothing(name, dense, tmp_path):
    damage, message = DAMAGE[name]
    source = dense()
    pickle_weights(source)
    damage(source / "pytorch_model.bin")
    with pytest.raises(InputError, match=message) as refusal:
        upcycle(source, tmp_path / "out", experts=4)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_missing_file_of_several_is_named(dense, tmp_path):
    source = dense()
    pickle_weights(source, files=2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"00002\.bin is missing, but pytorch_model\.bin\.index"):
        upcycle(source, tmp_path / "out", experts=4)
