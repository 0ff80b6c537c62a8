"""A flipped byte or a missing end of any file is named in one line, and nothing is unpickled."""

import os
import random
import shutil

import pytest
import torch
from safetensors import safe_open

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.data.prepared import PreparedData


def flip(file, position) -> None:
    with file.open("r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ 0x10]))


def truncate(file) -> None:
    os.truncate(file, file.stat().st_size - 100)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def assert_refused(ended, file) -> None:
    """See one line that names the file, and 2."""
    assert ended.code == 2, ended.output
    assert ended.output.startswith("moezoo: error: ")
    assert ended.output.count("\n") == 1
    assert str(file) in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_commands_name_the_damaged_file(server, fit, run, data, tmp_path, damage):
    def spoil(file):
        return truncate(file) if damage == "truncated" else flip(file, file.stat().st_size // 2)

    checkpoint = run / "checkpoints" / "last.ckpt"
    spoil(checkpoint)
    before = checkpoint.read_bytes()
    assert_refused(server.run(*fit(run), "--ckpt_path=last", folder=tmp_path), checkpoint)
    assert checkpoint.read_bytes() == before
    weights = run / "model" / "model.safetensors"
    spoil(weights)
    generate = ["generate", f"--checkpoint={run / 'model'}", "--prompt=the"]
    assert_refused(server.run(*generate, folder=tmp_path), weights)
    tokens = shutil.copytree(data, tmp_path / "data") / "train.bin"
    spoil(tokens)
    options = {"data.data_dir": tokens.parent}
    ended = server.run(*fit(tmp_path / "new", **options), folder=tmp_path)
    assert_refused(ended, tokens)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_flipped_byte_anywhere_is_found_or_harmless(run):
    """Between the parts of an archive lie bytes that mean nothing."""
    checkpoint, model = run / "checkpoints" / "last.ckpt", run / "model"
    expected = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    for file, read in (
        (checkpoint, lambda: AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]),
        (model / "model.safetensors", lambda: load_checkpoint(model)[0].state_dict()),
    ):
        chance, messages = random.Random(0), []
        for _ in range(60):
            position = chance.randrange(file.stat().st_size)
            flip(file, position)
            try:
                state = read()
            except InputError as error:
                messages.append(str(error))
            else:
                known = {name.removeprefix("model."): t for name, t in expected.items()}
                for name, tensor in state.items():
                    name = name.removeprefix("model.") if file == checkpoint else name
                    assert torch.equal(tensor, known[name]), (file, position)
            flip(file, position)
        assert len(messages) >= 30, file
        assert all(str(file) in line and "\n" not in line for line in messages)
        read()


def test_every_token_is_covered(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    prepared = PreparedData.load(copy)
    prepared.check_sums()
    for name in ("train", "val"):
        file = prepared.file(name)
        for position in (0, file.stat().st_size - 1):
            flip(file, position)
            with pytest.raises(InputError, match=f"{name}.bin is damaged: its checksum is wrong"):
                prepared.check_sums()
            flip(file, position)


@pytest.mark.slow
def test_damaged_tokens_are_prepared_again(server, corpus, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    flip(copy / "train.bin", 100)
    arguments = [f"--source={corpus}", f"--output={copy}", "--vocab_size=300"]
    ended = server.run("prepare", *arguments, "--val_fraction=0.1", folder=tmp_path)
    assert ended.code == 0, ended.output
    assert "preparing again, as data_dir: " in ended.output
    assert (copy / "train.bin").read_bytes() == (data / "train.bin").read_bytes()


def test_the_checksum_of_weights_is_in_their_own_header(run):
    with safe_open(run / "model" / "model.safetensors", framework="pt") as tensors:
        assert set(tensors.metadata()) == {"format", "crc32"}


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(server, fit, run, tmp_path, zipped):
    harm = tmp_path / "harm"
    checkpoint = run / "checkpoints" / "last.ckpt"
    state = {**torch.load(checkpoint, weights_only=True), "extra": Command(f"touch {harm}")}
    torch.save(state, checkpoint, _use_new_zipfile_serialization=zipped)
    (run / "model" / "model.safetensors").unlink()
    torch.save(state, run / "model" / "pytorch_model.bin")
    model = run / "model"
    for arguments, file in (
        ([*fit(run), "--ckpt_path=last"], checkpoint),
        (["validate", *fit(run)[1:]], checkpoint),
        (["test", *fit(run)[1:]], checkpoint),
        ([*fit(tmp_path / "new"), f"--model.initialize_from={model}"], model),
        (["generate", f"--checkpoint={model}", "--prompt=the"], model),
    ):
        assert_refused(server.run(*arguments, folder=tmp_path), file)
        assert not harm.exists(), arguments
    torch.load(checkpoint, weights_only=False)
    assert harm.exists()  # it would have been run
