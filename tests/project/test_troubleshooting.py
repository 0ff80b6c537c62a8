"""Every message of the page on troubleshooting is raised, and none is there without its raiser."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import moezoo
import moezoo_kernels
from moezoo.__main__ import main
from moezoo.command.explanations import explain
from moezoo.command.keys import full_keys
from moezoo.command.names import check_names
from moezoo.command.settings import read_settings
from moezoo_kernels import product_libraries
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.checkpoints.locks import writing
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.generate import new_tokens
from moezoo_train.checkpoint import identity
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.data.assemble import split_threshold
from moezoo_train.data.prepare import prepare
from moezoo_train.data.prepared import PreparedData
from moezoo_train.data.train_tokenizer import train_tokenizer
from moezoo_train.data.windows import TrainBatches
from moezoo_train.finetune.pretrained import check_length
from moezoo_train.run import cli
from moezoo_train.run.guard import StepGuard
from moezoo_train.run.refusals import check_trainer, check_validation_interval
from moezoo_train.run.run_directory import find_checkpoint, find_stale

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
CPU = {**cli.TRAINER_DEFAULTS, "accelerator": "cpu"}


def write(name: str, content: str | bytes = "") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def under(keys: str, value: object, act: Callable[[], object]) -> None:
    """Do something where a configuration has a value under these keys, as a command has."""
    options: object = value
    for key in reversed(keys.split(".")):
        options = Namespace(**{key: options})
    with full_keys(options):
        act()


def small(**fields: object) -> MoezooForCausalLM:
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    return MoezooForCausalLM(MoezooConfig(**sizes, **heads, **fields))


def unknown_option() -> int:
    write("run.yaml", json.dumps({"model": {"ffn": "moezoo.SparseMoE"}}))
    return main(["fit", "--config", "run.yaml", "--model.ffn.num_expert", "4"])


def contradicting_options() -> None:
    under(
        "model.ffn.init_args.top_k",
        9,
        lambda: moezoo.SparseMoE(16, num_experts=8, top_k=9),
    )


def similar_file() -> None:
    write("moe.yml", "a: 1")
    read_settings("moe.yaml")


def missing_package() -> None:
    raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")


def earlier_run() -> None:
    write("run/config.yaml", "a: 1")
    find_stale(Path("run"), overwrite=False)


def other_writer() -> None:
    hold = "from filelock import FileLock\nlock = FileLock('.run.lock')\nlock.acquire()"
    command = [sys.executable, "-c", f"import sys\n{hold}\nprint(1, flush=True)\nsys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"1\n"
        with writing("run"):
            pass


def other_model() -> None:
    saved = identity.describe(small().config)
    other = MoezooConfig(**{**small().config.to_dict(), "hidden_size": 32})
    with identity.own_names():
        identity.check_model(saved, other)


def damaged_checkpoint() -> None:
    path = Path("run/checkpoints/last.ckpt")
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(500)}}, str(path))
    spoil(path)
    AtomicCheckpointIO().load_checkpoint(str(path))


def loss_that_is_not_finite() -> None:
    trainer = SimpleNamespace(
        precision="32-true",
        global_step=0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        datamodule=SimpleNamespace(name_batch=lambda back: "windows 3, 5 of data/train.bin"),
    )
    StepGuard("stop").allows(trainer, torch.tensor([float("nan")]), 1.0)


def small_text() -> None:
    train_tokenizer(["some words, and some more of them"] * 3, Path("here"), 4096)


def damaged_tokens() -> None:
    for number in range(4):
        write(f"corpus/{number}.txt", f"{number} some words, and {number} more of them\n" * 40)
    prepare(source="corpus", output="data", vocab_size=300)
    spoil(next(Path("data").glob("train*")))
    PreparedData.load("data").check_sums()


def configured(**fields: object) -> None:
    """Load a directory with a configuration."""
    write("model/config.json", json.dumps(fields))
    save_file({"weight": torch.zeros(1)}, "model/model.safetensors")
    load_as_it_is("model")


def quantised() -> None:
    LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained("model")
    save_file({"weight": torch.zeros(1)}, "model/model.safetensors")
    load_as_it_is("model")


def spoilt_weights() -> None:
    model = small()
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained("model")
    load_as_it_is("model")


def swapped_hash() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    moezoo.swap(model, "moezoo.HashLayer")


def not_causal() -> None:
    (method,) = (method for method in moezoo.zoo() if method.name == "expert_choice")
    layer = method.build(16).config()
    del layer["init_args"]["d_model"]
    small(ffn=[{"layers": "all", **layer}])


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


RAISERS: dict[str, Callable[[], object]] = {
    "there is no command 'fitt'": lambda: main(["fitt"]),
    "model.ffn.init_args.num_expert: ": unknown_option,
    "model.ffn: the zoo has no method": lambda: check_names({"model": {"ffn": "swich"}}),
    "model.ffn.init_args.top_k: ": contradicting_options,
    "config: there is no file": similar_file,
    "broken.yaml: ": lambda: read_settings(str(write("broken.yaml", "a: 1\nmodel: ffn: x\n"))),
    "twice.yaml: ": lambda: read_settings(
        str(write("twice.yaml", "model:\n  d_model: 8\n  d_model: 16\n"))
    ),
    "lm_eval is not installed": missing_package,
    "output: run already holds": earlier_run,
    "output: another process": other_writer,
    "ckpt_path: there is no": lambda: find_checkpoint(Path("run"), "best", "fit", False),
    "ckpt_path: model.d_model": other_model,
    "ckpt_path: run/checkpoints/last.ckpt is damaged": damaged_checkpoint,
    "trainer.val_check_interval: ": lambda: check_validation_interval(
        {"val_check_interval": 200, "accumulate_grad_batches": 3}
    ),
    "step 1: loss nan": loss_that_is_not_finite,
    "trainer.accelerator: ": lambda: check_trainer({**CPU, "accelerator": "gpu"}),
    "trainer.precision: ": lambda: check_trainer({**CPU, "precision": "16-mixed"}),
    "trainer.devices: ": lambda: check_trainer({**CPU, "devices": "0,1"}),
    "backend: ": lambda: moezoo_kernels.use("gpu"),
    "MOEZOO_PRODUCTS: ": lambda: product_libraries.checked("mkl"),
    "source: ": lambda: split_threshold(np.array([7], np.uint64), 0.1),
    "vocab_size: ": small_text,
    "data.sequence_length: ": lambda: check_length(small(), 128),
    "data.batch_size: ": lambda: under(
        "data.batch_size", 4096, lambda: TrainBatches(np.zeros(990, np.uint16), 16, 4096)
    ),
    "data_dir: ": damaged_tokens,
    "checkpoint: model does not exist": lambda: load_as_it_is("model"),
    "checkpoint: model/config.json: model_type: ": lambda: configured(model_type="resnet"),
    "checkpoint: model/config.json: quantization_config: ": quantised,
    "checkpoint: 'model.norm.weight'": spoilt_weights,
    "factory: ": swapped_hash,
    "ffn[0]: ": not_causal,
    "use_reentrant: ": lambda: small().activation_checkpointing_enable({"use_reentrant": True}),
    "max_new_tokens: ": lambda: new_tokens(small(), 5, 500),
    "no space left on device": full_disk,
}
"""What raises a message, by how it begins."""


def messages() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```text\n(.*)\n```$", text, re.MULTILINE)


def said(act: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the line that a command, or the exception of a function, says."""
    try:
        code = act()
    except Exception as error:
        return explain(error)
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("moezoo: error: ")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("begin", RAISERS)
def test_each_message_is_raised(begin, no_gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (message,) = (message for message in messages() if message.startswith(begin))
    pattern = ".+".join(map(re.escape, message.split("…")))
    line = said(RAISERS[begin], capsys)
    assert line is not None
    assert re.fullmatch(pattern, line), line


def test_no_message_is_without_its_raiser_or_said_twice():
    found = messages()
    assert len(found) == len(set(found)) == len(RAISERS)
    for message in found:
        assert sum(message.startswith(begin) for begin in RAISERS) == 1, message


def test_each_message_is_explained():
    sections = re.split(r"^```text\n.*\n```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections[1:]:
        assert len(section.partition("\n## ")[0].split()) > 8
