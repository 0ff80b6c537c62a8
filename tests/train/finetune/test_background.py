"""Checkpoints written while training goes on are those that would have been written at once."""

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from moezoo.errors import InputError
from moezoo_train.checkpoint import files as checkpointing
from moezoo_train.checkpoint.files import AtomicCheckpointIO, BackgroundCheckpointIO
from moezoo_train.run.callbacks import LastCheckpoint
from moezoo_train.run.cli import run

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Go(pl.Callback):
    """Let the thread write only when training is a step further."""

    def __init__(self) -> None:
        self.further = threading.Event()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            self.further.set()


def train(make_model, make_trainer, random_tokens, folder: Path, plugin: Any, *callbacks) -> None:
    trainer = make_trainer(
        max_steps=4,
        plugins=[plugin],
        enable_checkpointing=True,
        callbacks=[LastCheckpoint(folder, every_n_steps=2), *callbacks],
    )
    trainer.fit(make_model(), random_tokens)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(v, right[k]) for k, v in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_what_is_written_late_is_the_state_at_the_time(
    make_model, make_trainer, random_tokens, tmp_path, monkeypatch
):
    """The thread waits until training has changed everything that it is to write."""
    folder = tmp_path / "checkpoints"
    kept: dict[str, list[Any]] = {"at once": [], "late": []}
    train_further = Go()
    save = torch.save

    def record(where: str, late: bool):
        def write(state, file):
            if late and not kept[where]:
                assert train_further.further.wait(60)
            save(state, file)
            file.flush()
            kept[where].append(torch.load(file.name, weights_only=True))

        return write

    for where, plugin in (("at once", AtomicCheckpointIO()), ("late", BackgroundCheckpointIO())):
        monkeypatch.setattr(checkpointing.torch, "save", record(where, where == "late"))
        train(make_model, make_trainer, random_tokens, folder, plugin, train_further)
    assert train_further.further.is_set()
    assert [c["global_step"] for c in kept["late"]] == [2, 4]
    assert len(kept["at once"]) == len(kept["late"])
    for early, late in zip(kept["at once"], kept["late"], strict=True):
        assert early.keys() == late.keys()
        for key in early.keys() - {"callbacks"}:
            assert same(early[key], late[key]), key
        assert same(early["callbacks"]["RandomState"], late["callbacks"]["RandomState"])


def test_tied_tensors_are_written_once(tmp_path):
    weight = torch.arange(1000.0)
    state = {"state_dict": {"a": weight, "b": weight.detach()}, "pytorch-lightning_version": "2"}
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(state, tmp_path / "tied.ckpt")
    weight.zero_()
    loaded = plugin.load_checkpoint(tmp_path / "tied.ckpt")["state_dict"]
    assert torch.equal(loaded["a"], torch.arange(1000.0))
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    plugin.teardown()


def test_the_first_checkpoint_is_there_before_anything_follows_it(tmp_path):
    state = {"state_dict": {"a": torch.zeros(1)}, "pytorch-lightning_version": "2"}
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(state, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").exists()
    assert plugin._pending is None
    plugin.save_checkpoint(state, tmp_path / "last.ckpt")
    assert plugin._pending is not None
    plugin.teardown()


def test_an_error_of_the_thread_ends_the_run_and_keeps_the_earlier_file(
    make_model, make_trainer, random_tokens, tmp_path, monkeypatch
):
    folder = tmp_path / "checkpoints"
    save, written = torch.save, []

    def full(state, file):
        if written:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        written.append(state["global_step"])
        save(state, file)

    monkeypatch.setattr(checkpointing.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(make_model, make_trainer, random_tokens, folder, BackgroundCheckpointIO())
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert written == [2] == [state["global_step"]]


def test_it_is_chosen_by_a_field_and_not_with_directories(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(10):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    options = {
        "output": tmp_path / "run",
        "checkpoint_async": "true",
        "loggers": "[csv]",
        "sample_tokens": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.enable_progress_bar": "false",
        "data.source": tmp_path / "corpus",
        "data.data_dir": tmp_path / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "data.val_fraction": 0.2,
        "model.d_model": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.schedule.warmup_steps": 1,
    }
    command = ["fit", *(f"--{key}={value}" for key, value in options.items())]
    run(command)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 2
    directories = [
        "--trainer.strategy=moezoo_train.parallel.fsdp2.FSDP2Strategy",
        "--trainer.strategy.save_distributed_checkpoint=true",
        "--overwrite=true",
    ]
    with pytest.raises(InputError, match=r"checkpoint_async: .* set one of the two to false"):
        run([*command, *directories])
