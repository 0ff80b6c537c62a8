"""Two processes train as one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moezoo_train.checkpoint.export import export
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.run.callbacks import RandomState, get_random_state
from moezoo_train.run.cli import run

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parent))

import fits  # noqa: E402
from two_processes import assert_same_directories, launch  # noqa: E402


def arguments(folder: Path, name: str, **options) -> list[str]:
    defaults = {
        "output": folder / name,
        "checkpoint_every": 2,
        "loggers": "[csv]",
        "sample_tokens": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1,
        "data.source": folder / "corpus",
        "data.data_dir": folder / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.val_fraction": 0.2,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.ffn": "moezoo.SparseMoE",
        "model.ffn.num_experts": 4,
        "model.schedule.warmup_steps": 2,
        "model.schedule.total_steps": 4,
    }
    return ["fit", *(f"--{key}={value}" for key, value in (defaults | options).items())]


def of_two(folder: Path, name: str, **options) -> list[str]:
    """Return the command line of a run of two processes."""
    options |= {"data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}
    return arguments(folder, name, **options)


def run_alone(folder: Path, words: list[str]) -> None:
    """Run the command in a process of its own, which Lightning repeats for the other rank."""
    paths = [str(ROOT / part) for part in (".", "kernels", "models", "train")]
    process = subprocess.run(
        [sys.executable, "-m", "moezoo", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory) -> Path:
    """Return where a run of one process lies, one of two, and one of two in two parts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    run(arguments(folder, "one", **{"data.batch_size": 4}))
    whole, half = of_two(folder, "two"), of_two(folder, "parts", **{"trainer.max_steps": 2})
    launch(server, fits.__file__, folder, json.dumps(whole), json.dumps(half))
    run_alone(folder, of_two(folder, "parts", ckpt_path="last"))
    return folder


def metrics(runs: Path, name: str, columns: tuple[str, ...]) -> list[list[str | None]]:
    return [[row.get(c) for c in columns] for row in read_metrics(runs / name / "metrics.csv")]


def checkpoint(runs: Path, name: str) -> dict:
    return torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(runs):
    columns = ("tokens", "train/loss", "train/grad_norm", "train/lr", "val/loss")
    columns += ("train/aux/load_balancing", "experts/max_over_mean/layer_00")
    one, two = (metrics(runs, name, columns) for name in ("one", "two"))
    assert len(one) == len(two) == 4 + 2  # steps and validations
    for left, right in zip(one, two, strict=True):
        for name, value, other in zip(columns, left, right, strict=True):
            assert (value is None) == (other is None), name
            if value is not None:
                assert float(other) == pytest.approx(float(value), rel=2e-5), name
    state = checkpoint(runs, "two")["state_dict"]
    for name, tensor in checkpoint(runs, "one")["state_dict"].items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_exactly(runs):
    columns = ("step", "tokens", "train/loss", "train/grad_norm", "val/loss")
    assert metrics(runs, "parts", columns) == metrics(runs, "two", columns)
    whole = checkpoint(runs, "two")["state_dict"]
    for name, tensor in checkpoint(runs, "parts")["state_dict"].items():
        assert torch.equal(tensor, whole[name]), name
    ranks = checkpoint(runs, "parts")["callbacks"]["RandomState"]["ranks"]
    assert len(ranks) == 2


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_exported_as_their_model(runs, tmp_path):
    export(runs / "two" / "checkpoints" / "last.ckpt", tmp_path / "model")
    assert_same_directories(runs / "two" / "model", tmp_path / "model")


def test_each_rank_takes_its_own_random_state():
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(get_random_state())
    callback = RandomState()
    callback.load_state_dict({"ranks": states})
    callback.on_train_start(SimpleNamespace(world_size=2, global_rank=1), None)
    callback.on_train_batch_start(None, None, None, 0)
    drawn = torch.rand(4)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(4))


def test_another_number_of_ranks_keeps_the_seed():
    callback = RandomState()
    callback.load_state_dict({"ranks": [get_random_state()] * 2})
    with pytest.warns(UserWarning, match="written by 2 processes, this run has 1"):
        callback.on_train_start(SimpleNamespace(world_size=1, global_rank=0), None)
    torch.manual_seed(5)
    callback.on_train_batch_start(None, None, None, 0)
    drawn = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))
