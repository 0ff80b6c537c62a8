"""Two processes against one: how tests start them, and how they compare what both computed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import distributed_cases as cases  # also a program of its own

MARKS = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:the checkpoint was written by 2 processes"),
]


def launch(server: Any, program: str, folder: Path, *arguments: str, **variables: str) -> None:
    """Run a program in two processes; it leaves its results in a folder.

    Args:
        server: forks them.
        program: its file.
        folder: given to it first.
        arguments: given to it as well.
        variables: of its environment.
    """
    order = {"program": program, "environment": variables, "limit": 1200.0}
    order["imports"] = ["moezoo_train.run.cli", "moezoo_train.parallel.fsdp2"]  # once for both
    for ended in server.run_ranks(2, folder, *arguments, folder=folder, **order):
        assert ended.code == 0, ended.output[-5000:]


def fit_arguments(folder: Path, **options: Any) -> list[str]:
    """Write a corpus, and give the command line of a run of two processes that reads it."""
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    defaults = {
        "output": folder / "run",
        "checkpoint_every": 2,
        "loggers": "[csv]",
        "sample_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
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
    return ["fit", *(f"--{key}={value}" for key, value in (defaults | options).items())]


ROUNDING = 5e-6
"""What fp32 may differ by: on most processors 5e-7, on one with AVX-512 and AMX 1.1e-6."""

_ALONE: dict[str, dict[str, Any]] = {}


def alone(case: cases.Case, folder: Path) -> dict[str, Any]:
    """Run a case in this process, once for all tests."""
    if repr(case) not in _ALONE:
        _ALONE[repr(case)] = cases.train(case, "auto", folder)
    return _ALONE[repr(case)]


def read(folder: Path, name: str) -> Any:
    """Read what the two processes left under a name."""
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal(
    one: dict[str, Any], two: dict[str, Any], tolerance: float = ROUNDING, resumed: bool = False
) -> None:
    """Compare losses, gradients and parameters, each relative to the largest of its tensor.

    Args:
        one: what one process computed.
        two: what two did.
        tolerance: of each.
        resumed: ``two`` began where the first half of ``one`` ends, which has the gradients.
    """
    losses = one["losses"][cases.HALF :] if resumed else one["losses"]
    assert losses.shape == two["losses"].shape
    # NaN where a step was skipped.
    torch.testing.assert_close(
        two["losses"], losses, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    for kind in ("parameters",) if resumed else ("gradients", "parameters"):
        assert one[kind]
        assert one[kind].keys() == two[kind].keys()
        for name, tensor in one[kind].items():
            error = float((two[kind][name].double() - tensor.double()).abs().max())
            limit = tolerance * max(1.0, float(tensor.abs().max()))
            assert error <= limit, f"{kind} {name}: {error}"


def assert_repeats(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Compare a resumed run with the second half of the uninterrupted one, to the bit."""
    assert torch.equal(resumed["losses"], whole["losses"][cases.HALF :])
    for name, tensor in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], tensor), name


def assert_same_directories(one: Path, two: Path) -> None:
    """Compare two model directories: configurations, tokenizers, and tensors to the bit."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            first, second = load_file(one / name), load_file(two / name)
            assert first.keys() == second.keys()
            for key, tensor in first.items():
                assert tensor.dtype == second[key].dtype
                assert torch.equal(tensor, second[key]), key
        elif name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((two / name).read_text())
        else:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
