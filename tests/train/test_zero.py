"""DeepSpeed's ZeRO: two processes against one, checkpoints, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from moezoo.errors import InputError
from moezoo_models.checkpoints import load_checkpoint
from moezoo_train.guard import SpikeRule, StepGuard
from moezoo_train.loggers import read_metrics
from moezoo_train.optim import OptimizerConfig
from moezoo_train.strategies import check_sparse_gradients, lay_out_for
from moezoo_train.throughput import count_parameters
from moezoo_train.zero import ZeROStrategy, check_zero

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import zero_cases  # noqa: E402 - also a program of its own
from zero_cases import READINGS, STAGES, cases, half  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:the checkpoint was written by 2 processes"),
]
INSTALLED = importlib.util.find_spec("deepspeed") is not None
with_deepspeed = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not here: pip install deepspeed"),
]


def marked(test: Any) -> Any:
    for mark in with_deepspeed:
        test = mark(test)
    return test


def arguments(folder: Path) -> list[str]:
    options = {
        "output": folder / "run",
        "checkpoint_every": 2,
        "loggers": "[csv]",
        "sample_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy": "zero3",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
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
    folder = tmp_path_factory.mktemp("zero")
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    paths = [str(ROOT / part) for part in (".", "kernels", "models", "train")]
    paths += [p for p in [os.environ.get("PYTHONPATH")] if p]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launcher, zero_cases.__file__, str(folder), *arguments(folder)],
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
        case = zero_cases.INTERRUPTED if name == "whole" else cases.CASES[name]
        _ALONE[name] = cases.train(case, "auto", folder)
    return _ALONE[name]


def read(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal(one: dict[str, Any], two: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Compare losses, and parameters relative to the largest of their tensor."""
    losses = one["losses"][-len(two["losses"]) :]
    torch.testing.assert_close(two["losses"], losses, rtol=tolerance, atol=tolerance)
    assert one["parameters"].keys() == two["parameters"].keys()
    for name, tensor in one["parameters"].items():
        error = float((two["parameters"][name].double() - tensor.double()).abs().max())
        assert error <= tolerance * max(1.0, float(tensor.abs().max())), f"{name}: {error}"


@marked
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "name", [*zero_cases.LAYERS, "accumulation", "activation checkpointing", "bf16"]
)
def test_two_processes_equal_one(folder, name, stage):
    one, two = alone(name, folder), read(folder, f"{name}, {stage}")
    assert len(one["losses"]) == len(two["losses"]) >= 6
    assert_equal(one, two, 1e-2 if name == "bf16" else 1e-6)


@marked
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_repeats_the_run_to_the_bit(folder, stage):
    whole, resumed = read(folder, f"whole, {stage}"), read(folder, f"{stage} to {stage}")
    assert torch.equal(resumed["losses"], whole["losses"][cases.HALF :])
    for name, tensor in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], tensor), name


@marked
@pytest.mark.parametrize("reading", [*READINGS[len(STAGES) :], ("fsdp2", 2), (3, "fsdp2")], ids=str)
def test_any_strategy_goes_on_from_any_checkpoint(folder, reading):
    writer, reader = reading
    assert_equal(alone("whole", folder), read(folder, f"{writer} to {reader}"))


@marked
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_a_checkpoint(folder, stage):
    resumed = cases.train(zero_cases.INTERRUPTED, "auto", folder, resume=half(folder, stage))
    assert_equal(alone("whole", folder), resumed)


@marked
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_refused(folder, stage):
    message = read(folder, f"not finite, {stage}")
    assert "nothing was updated" in message, message


@marked
def test_the_command_leaves_a_complete_run(folder):
    rows = read_metrics(folder / "run" / "metrics.csv")
    norms = [float(row["train/grad_norm"]) for row in rows if "train/grad_norm" in row]
    assert len(norms) == 4
    assert all(norm > 0 for norm in norms)
    assert (folder / "run" / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "run" / "sample.txt").is_file()
    model, tokenizer = load_checkpoint(folder / "run" / "model")
    assert tokenizer is not None
    report = json.loads((folder / "run" / "report.json").read_text())
    counted = report["total_parameters"], report["active_parameters"]
    assert counted == count_parameters(model)
    state = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][f"model.{name}"]), name


def fitting(strategy: Any, **options: Any) -> SimpleNamespace:
    """Stand in for a module that is about to be trained."""
    defaults = {
        "optimizer_config": OptimizerConfig(),
        "guard": StepGuard("stop"),
        "compile_model": False,
        "lora": None,
        "trainer": SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING)),
    }
    return SimpleNamespace(**(defaults | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_config": OptimizerConfig("muon")}, "optimizer.name: Muon wants whole"),
        ({"guard": StepGuard("skip")}, "model.on_nan: ZeRO can not skip .*; give stop"),
        ({"guard": StepGuard("stop", SpikeRule())}, "model.spikes: ZeRO can not skip .*; give nu"),
        ({"compile_model": True}, "model.compile: ZeRO's hooks"),
        ({"lora": object()}, "adapters are not divided"),
    ],
    ids=["muon", "skip", "spikes", "compile", "lora"],
)
def test_what_zero_would_compute_otherwise_is_refused(options, message):
    strategy = ZeROStrategy()
    with pytest.raises(InputError, match=message) as error:
        lay_out_for(strategy, fitting(strategy, **options))
    assert "\n" not in str(error.value)


def test_lower_precision_of_parameters_is_refused():
    strategy = ZeROStrategy()
    strategy.precision_plugin = SimpleNamespace(precision="bf16-true")
    with pytest.raises(InputError, match=r"trainer\.precision: bf16-true .* give 32-true or"):
        check_zero(strategy, fitting(strategy))


def test_sparse_gradients_are_refused():
    with pytest.raises(InputError, match=r"trainer\.strategy: it has no sparse gradients"):
        check_sparse_gradients(ZeROStrategy(), compiled=False)


def test_stages_are_checked():
    with pytest.raises(InputError, match="stage"):
        ZeROStrategy(stage=4)


def test_lightnings_strategy_which_unpickles_is_refused():
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # wants DeepSpeed to be made
    with pytest.raises(InputError, match=r"reads checkpoints by unpickling; give zero1"):
        lay_out_for(strategy, fitting(strategy))


def test_a_missing_deepspeed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'moezoo\[deepspeed\]'"):
        ZeROStrategy().setup_environment()
