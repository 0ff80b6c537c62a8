"""Two processes against one: every strategy, and checkpoints from each to each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from moezoo.errors import InputError
from moezoo_models.checkpoints import load_checkpoint
from moezoo_train.checkpointing import AtomicCheckpointIO
from moezoo_train.loggers import read_metrics
from moezoo_train.strategies import FSDP2Strategy, lay_out_for

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import distributed_cases as cases  # noqa: E402 - also a program of its own

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def arguments(folder: Path) -> list[str]:
    """Give the command line of a run with shared experts and divided checkpoints."""
    options = {
        "output": folder / "run",
        "checkpoint_every": 2,
        "loggers": "[csv]",
        "sample_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy": "moezoo_train.strategies.FSDP2Strategy",
        "trainer.strategy.expert_parallel": 2,
        "trainer.strategy.save_distributed_checkpoint": "true",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "data.source": folder / "corpus",
        "data.data_dir": folder / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "data.val_fraction": 0.2,
        "model.d_model": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.schedule.warmup_steps": 2,
        "model.ffn": "moezoo.SparseMoE",
        "model.ffn.num_experts": 4,
    }
    return ["fit", *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return where two processes left everything that they computed."""
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    half = cases.checkpoint_path(folder, "one process")
    cases.train(cases.INTERRUPTED, "auto", folder, steps=cases.HALF, save=half)
    paths = [str(ROOT / part) for part in (".", "kernels", "models", "train")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launcher, cases.__file__, str(folder), *arguments(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


_ALONE: dict[str, dict[str, Any]] = {}


def alone(name: str, folder: Path) -> dict[str, Any]:
    """Run a case in this process, once."""
    if name not in _ALONE:
        case = cases.INTERRUPTED if name == "whole" else cases.CASES[name]
        _ALONE[name] = cases.train(case, "auto", folder)
    return _ALONE[name]


def read(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal(one: dict[str, Any], two: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Compare losses, gradients and parameters, each relative to the largest of its tensor."""
    assert one["losses"].shape == two["losses"].shape
    torch.testing.assert_close(two["losses"], one["losses"], rtol=tolerance, atol=tolerance)
    for kind in ("gradients", "parameters"):
        assert one[kind].keys() == two[kind].keys()
        for name, tensor in one[kind].items():
            error = float((two[kind][name].double() - tensor.double()).abs().max())
            limit = tolerance * max(1.0, float(tensor.abs().max()))
            assert error <= limit, f"{kind} {name}: {error}"


@pytest.mark.parametrize(("name", "strategy"), cases.TWO_PROCESSES)
def test_two_processes_equal_one(folder, name, strategy):
    # Two processes round sums of bf16 products, each exact to 4e-3, in another order.
    tolerance = 3e-2 if name == "bf16" else 1e-6
    one, two = alone(name, folder), read(folder, f"{name}, {strategy}")
    assert_equal(one, two, tolerance)
    assert len(one["losses"]) >= 6
    assert one["gradients"]


@pytest.mark.parametrize("writer", cases.WRITERS)
def test_resuming_repeats_the_run_to_the_bit(folder, writer):
    whole, resumed = read(folder, f"whole, {writer}"), read(folder, f"{writer} to {writer}")
    assert torch.equal(resumed["losses"], whole["losses"][cases.HALF :])
    for name, tensor in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], tensor), name


@pytest.mark.parametrize(("writer", "reader"), [r for r in cases.READINGS if r[0] != r[1]])
def test_any_strategy_goes_on_from_any_checkpoint(folder, writer, reader):
    expected, resumed = alone("whole", folder), read(folder, f"{writer} to {reader}")
    assert_equal({**expected, "losses": expected["losses"][cases.HALF :], "gradients": {}}, resumed)


@pytest.mark.filterwarnings("ignore:the checkpoint was written by 2 processes")
@pytest.mark.parametrize("writer", cases.WRITERS)
def test_one_process_goes_on_from_any_checkpoint(folder, writer):
    path = cases.checkpoint_path(folder, writer)
    expected = alone("whole", folder)
    resumed = cases.train(cases.INTERRUPTED, "auto", folder, resume=path)
    assert_equal({**expected, "losses": expected["losses"][cases.HALF :], "gradients": {}}, resumed)


def test_the_command_leaves_a_complete_run(folder):
    rows = read_metrics(folder / "run" / "metrics.csv")
    assert sum("train/loss" in row for row in rows) == 4
    assert (folder / "run" / "checkpoints" / "last.ckpt" / "rest.ckpt").is_file()
    assert (folder / "run" / "sample.txt").is_file()
    model, tokenizer = load_checkpoint(folder / "run" / "model")
    assert tokenizer is not None
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 4


@pytest.mark.parametrize("damage", ["missing part", "truncated part", "truncated rest"])
def test_a_damaged_directory_is_one_line(folder, tmp_path, damage):
    path = tmp_path / "half.ckpt"
    shutil.copytree(cases.checkpoint_path(folder, "fsdp2 directory"), path)
    part = sorted(path.glob("*.safetensors"))[1]
    if damage == "missing part":
        part.unlink()
    else:
        file = part if damage == "truncated part" else path / "rest.ckpt"
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"ckpt_path: .* is damaged or incomplete") as error:
        cases.train(cases.INTERRUPTED, "auto", tmp_path, resume=path)
    assert "\n" not in str(error.value)


def test_nothing_in_a_directory_is_unpickled(folder, tmp_path):
    path = tmp_path / "half.ckpt"
    shutil.copytree(cases.checkpoint_path(folder, "fsdp2 directory"), path)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".ckpt"}
    torch.save({"state_dict": Path()}, path / "rest.ckpt")  # a class, which reading would call
    with pytest.raises(InputError, match="is damaged or incomplete"):
        cases.train(cases.INTERRUPTED, "auto", tmp_path, resume=path)


def test_a_file_takes_the_place_of_a_directory(folder, tmp_path):
    path = tmp_path / "half.ckpt"
    shutil.copytree(cases.checkpoint_path(folder, "fsdp2 directory"), path)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert [file.name for file in tmp_path.iterdir()] == ["half.ckpt"]
    again = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    assert again.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(again[name], t) for name, t in checkpoint["state_dict"].items())


def test_ranks_that_do_not_divide_the_processes_are_refused(tmp_path):
    with pytest.raises(InputError, match="expert_parallel 2 × replicas 1 does not divide the 1"):
        cases.train(cases.INTERRUPTED, FSDP2Strategy(expert_parallel=2), tmp_path)


def test_other_sharding_strategies_are_refused():
    with pytest.raises(InputError, match=r"trainer\.strategy: .* want 'fsdp2'"):
        lay_out_for(ModelParallelStrategy(), module=None)
