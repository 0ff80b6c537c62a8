"""What the trainer cannot be told is said with its field and what can, before it is built."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from moezoo import InputError
from moezoo_train.run.cli import TRAINER_DEFAULTS
from moezoo_train.run.refusals import batch_counts, check_trainer, is_refusal, reword

CPU = {"accelerator": "cpu", "devices": "auto", "strategy": "auto", "precision": "32-true"}
REFUSED = [
    ({"accelerator": "gpu"}, "accelerator: there is no usable GPU here; give cpu, or auto"),
    ({"accelerator": "cuda"}, "accelerator: there is no usable CUDA GPU here; give cpu, or auto"),
    ({"accelerator": "mps"}, "accelerator: there is no usable Apple GPU here; give cpu, or auto"),
    ({"accelerator": "tpu"}, "accelerator: there is no usable TPU here; give cpu, or auto"),
    ({"accelerator": "gpus"}, "accelerator: 'gpus' is not known; did you mean 'gpu'?"),
    ({"accelerator": "CPU"}, "accelerator: 'CPU' is not known; did you mean 'cpu'?"),
    ({"devices": 0}, "devices: 0 is no number of processes; on a CPU give a whole number ≥ 1"),
    ({"devices": "0,1"}, "devices: 0,1 is no number of processes; on a CPU give"),
    ({"devices": [0, 1]}, "devices: [0, 1] is no number of processes; on a CPU give"),
    ({"strategy": "dpp"}, "strategy: 'dpp' is not known; e.g. auto, ddp, fsdp2 or deepspeed_sta"),
    ({"strategy": "fsdp"}, "strategy: fsdp needs a GPU, and there is none in this run; give fsdp2"),
    ({"precision": "16-mixed"}, "precision: 16-mixed computes in fp16, which needs a GPU, and th"),
    ({"precision": 16}, "precision: 16 computes in fp16, which needs a GPU, and there is none"),
    ({"precision": "16-mixed", "accelerator": "auto"}, "precision: 16-mixed computes in fp16"),
    ({"precision": "transformer-engine"}, "precision: transformer-engine needs transformer_engine"),
    ({"limit_train_batches": 1.5}, "limit_train_batches: 1.5 is out of range; give a share from"),
    ({"limit_val_batches": -1}, "limit_val_batches: -1 is out of range; give a whole number ≥ 0"),
    ({"limit_test_batches": 2.0}, "limit_test_batches: 2 is out of range; give a share from 0.0 t"),
    ({"overfit_batches": 2.5}, "overfit_batches: 2.5 is out of range; give a share from 0.0 to 1"),
    ({"val_check_interval": 0.5}, "val_check_interval: 0.5 is a share of an epoch, and validation"),
    ({"val_check_interval": 1.5}, "val_check_interval: 1.5 is out of range; give a whole number"),
    ({"val_check_interval": 0}, "val_check_interval: 0 is out of range; give a whole number of b"),
    ({"val_check_interval": "x"}, "val_check_interval: 'x' is no time; write DD:HH:MM:SS, or a"),
    ({"max_time": "1 h"}, "max_time: '1 h' is no time; write DD:HH:MM:SS"),
    ({"max_steps": -5}, "max_steps: -5 is out of range; give a whole number ≥ -1"),
    ({"max_epochs": -5}, "max_epochs: -5 is out of range; give a whole number ≥ -1"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: 0 is out of range; give a whole"),
    ({"gradient_clip_val": -1.0}, "gradient_clip_val: -1 is out of range; give a number ≥ 0"),
    ({"gradient_clip_algorithm": "vale"}, "gradient_clip_algorithm: 'vale' is not known; did you"),
    ({"profiler": "fast"}, "profiler: 'fast' is not known; choose from: advanced, pytorch"),
    ({"num_nodes": 0}, "num_nodes: 0 is out of range; give a whole number ≥ 1"),
    ({"fast_dev_run": -1}, "fast_dev_run: -1 is out of range; give a whole number ≥ 0"),
    ({"barebones": True}, "barebones: it leaves out what a run writes; set it to false"),
]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_each_names_its_field_and_the_fix(options, message, no_gpu):
    with pytest.raises(InputError) as caught:
        check_trainer({**TRAINER_DEFAULTS, **CPU, **options})
    assert str(caught.value).startswith(f"trainer.{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator": "auto", "precision": "bf16-mixed", "devices": "2", "strategy": "fsdp2"},
        {"precision": "16-true", "devices": 1, "limit_val_batches": 0, "max_steps": -1},
        {"limit_train_batches": 1.0, "val_check_interval": 0.5, "check_val_every_n_epoch": 1},
        {"val_check_interval": "00:01:00:00", "max_time": "00:00:10:00", "fast_dev_run": True},
        {"profiler": "simple", "gradient_clip_algorithm": "norm", "gradient_clip_val": None},
    ],
)
def test_what_the_trainer_takes_is_taken(options, no_gpu):
    check_trainer({**TRAINER_DEFAULTS, **CPU, **options})


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = {**CPU, "accelerator": "gpu", "precision": "16-mixed", "strategy": "fsdp"}
    for devices in ("auto", 2, "2", -1, [0, 1], "0,1"):
        check_trainer({**gpu, "devices": devices})
    for devices in (3, "3", [0, 2], "0,2"):
        with pytest.raises(InputError, match="asks for more than the 2 GPUs that are here"):
            check_trainer({**gpu, "devices": devices})
    with pytest.raises(InputError, match="devices: x is no number of GPUs; give a whole number"):
        check_trainer({**gpu, "devices": "x"})


def test_what_only_the_trainer_can_know_names_the_option_too():
    with pytest.raises(MisconfigurationException) as caught:
        Trainer(accelerator="cpu", limit_val_batches=-3, logger=False)
    assert is_refusal(caught.value)
    message = reword(caught.value)
    assert message.startswith("trainer.limit_val_batches: ")
    assert "`" not in message
    assert (
        reword(ValueError("`Timer(duration='x')` is odd")) == "trainer: Timer(duration='x') is odd"
    )
    assert not is_refusal(ValueError("of somebody else"))


def test_numbers_of_batches_are_integers_however_they_were_read():
    read = {"limit_val_batches": 2.0, "limit_train_batches": 0.5, "val_check_interval": 10.0}
    assert batch_counts(read) == {"limit_val_batches": 2, "val_check_interval": 10}
    assert batch_counts({"limit_val_batches": 1.0, "limit_test_batches": 2.5}) == {}
