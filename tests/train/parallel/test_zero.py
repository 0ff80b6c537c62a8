"""DeepSpeed's ZeRO: two processes against one, checkpoints, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_train.checkpoint.export import export
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.throughput import count_parameters
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.parallel.fit_strategy import check_sparse_gradients, parallelize_for
from moezoo_train.parallel.zero import ZeROStrategy, check_zero
from moezoo_train.run.guard import SpikeRule, StepGuard

sys.path.insert(0, str(Path(__file__).parent))

import zero_cases
from two_processes import (
    MARKS,
    ROUNDING,
    alone,
    assert_equal,
    assert_repeats,
    assert_same_directories,
    fit_arguments,
    launch,
    read,
)
from zero_cases import CASES, INTERRUPTED, READINGS, STAGES, TWO_PROCESSES, cases, half

pytestmark = MARKS


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory) -> Path:
    """Return where two processes left everything that they computed."""
    if importlib.util.find_spec("deepspeed") is None:
        assert sys.platform != "linux", "make test installs DeepSpeed"
        pytest.skip("DeepSpeed is installed on Linux only")
    folder = tmp_path_factory.mktemp("zero")
    strategy = {"trainer.strategy": "zero3", "trainer.accumulate_grad_batches": 2}
    compiled = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    launch(server, zero_cases.__file__, folder, *fit_arguments(folder, **strategy), **compiled)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), TWO_PROCESSES)
def test_two_processes_equal_one(folder, name, stage):
    one, two = alone(CASES[name], folder), read(folder, f"{name}, {stage}")
    assert len(one["losses"]) >= 6
    assert_equal(one, two, 3e-2 if name in ("bf16", "biased") else ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_selection_bias_stays_whole_beside_bf16(folder, stage):
    """Six steps of 1e-3 are no numbers of bf16; the checkpoint has them as they are."""
    state = read(folder, f"biased, {stage}")["parameters"]
    biases = [tensor for name, tensor in state.items() if name.endswith("selection_bias")]
    assert len(biases) == 2
    for bias in biases:
        assert bias.dtype == torch.float32
        assert bias.any()
        torch.testing.assert_close(bias, (bias * 1e3).round() / 1e3, rtol=0, atol=1e-6)
        assert not torch.equal(bias.bfloat16().float(), bias)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_repeats_the_run_to_the_bit(folder, stage):
    assert_repeats(read(folder, f"whole, {stage}"), read(folder, f"{stage} to {stage}"))


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS[len(STAGES) :], ids=str)
def test_any_strategy_goes_on_from_any_checkpoint(folder, reading):
    writer, reader = reading
    assert_equal(alone(INTERRUPTED, folder), read(folder, f"{writer} to {reader}"), resumed=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_a_checkpoint(folder, stage):
    resumed = cases.train(INTERRUPTED, "auto", folder, resume=half(folder, stage))
    assert_equal(alone(INTERRUPTED, folder), resumed, resumed=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_refused(folder, stage):
    message = read(folder, f"not finite, {stage}")
    assert "nothing was updated" in message, message


@pytest.mark.slow
def test_nothing_is_compiled(folder):
    assert not (folder / "extensions").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_its_checkpoint_is_exported_as_its_model(folder, tmp_path):
    export(folder / "run" / "checkpoints" / "last.ckpt", tmp_path / "model")
    assert_same_directories(folder / "run" / "model", tmp_path / "model")


def fitting(strategy: Any, **options: Any) -> SimpleNamespace:
    """Stand in for a module that is about to be trained."""
    defaults = {
        "optimizer_config": OptimizerConfig(),
        "guard": StepGuard("stop"),
        "compile_model": False,
        "part": SimpleNamespace(lora=None, neurons=None),
        "trainer": SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING)),
    }
    return SimpleNamespace(**(defaults | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_config": OptimizerConfig("muon")}, "optimizer.name: Muon wants whole"),
        ({"optimizer_config": OptimizerConfig("sgd")}, "optimizer.name: sgd has not been tried"),
        ({"guard": StepGuard("skip")}, "model.on_nan: ZeRO cannot skip .*; give stop"),
        ({"guard": StepGuard("stop", SpikeRule())}, "model.spikes: ZeRO cannot skip .*; give nu"),
        ({"compile_model": True}, "model.compile: ZeRO's hooks"),
        ({"part": SimpleNamespace(lora=object(), neurons=None)}, "adapters do not go with ZeRO"),
    ],
    ids=["muon", "sgd", "skip", "spikes", "compile", "lora"],
)
def test_what_zero_would_compute_otherwise_is_refused(options, message):
    strategy = ZeROStrategy()
    with pytest.raises(InputError, match=message) as error:
        parallelize_for(strategy, fitting(strategy, **options))
    assert "\n" not in str(error.value)


def test_lower_precision_of_parameters_is_refused():
    with pytest.raises(InputError, match=r"trainer\.precision: bf16-true .* give 32-true or"):
        check_zero("bf16-true", fitting(ZeROStrategy()))


def test_sparse_gradients_are_refused():
    with pytest.raises(InputError, match=r"trainer\.strategy: it has no sparse gradients"):
        check_sparse_gradients(ZeROStrategy(), compiled=False)


def test_stages_are_checked():
    with pytest.raises(InputError, match="stage"):
        ZeROStrategy(stage=4)


def test_lightnings_strategy_which_unpickles_is_refused():
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # wants DeepSpeed to be made
    with pytest.raises(InputError, match=r"reads checkpoints by unpickling; give zero1"):
        parallelize_for(strategy, fitting(strategy))


def test_a_missing_deepspeed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'moezoo\[deepspeed\]'"):
        ZeROStrategy().setup_environment()
