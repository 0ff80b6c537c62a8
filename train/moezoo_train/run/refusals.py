"""Options that Lightning's trainer rejects, each rejected here first with the field and the fix."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from moezoo.errors import InputError, check_int, check_number, nearest

_COUNTS = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "num_nodes": 1,
    "reload_dataloaders_every_n_epochs": 0,
}
"""Whole numbers and the smallest that each may be; null is left to the trainer."""

_SHARES = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
)
_PROFILERS = ("simple", "advanced", "pytorch", "xla")
_HALF = ("16", "16-mixed")
_TIME = r"\d+(:\d+){3}"


def batch_counts(options: Mapping[str, Any]) -> dict[str, int]:
    """Return the trainer's numbers of batches that were read as floats, as the integers they are.

    Which of ``int | float`` a parser tries first hangs on what was imported before: typing keeps
    one of ``Union[int, float]`` and ``Union[float, int]`` for both. A share is at most 1.
    """
    return {
        name: int(value)
        for name in (*_SHARES, "val_check_interval")
        if isinstance(value := options.get(name), float) and value > 1 and value.is_integer()
    }


def check_trainer(options: Mapping[str, Any]) -> None:
    """Check the trainer's options that are plain values.

    Raises:
        InputError: names the first that cannot be, and what can.
    """
    for name, minimum in _COUNTS.items():
        if options.get(name) is not None:
            check_int(f"trainer.{name}", options[name], minimum=minimum)
    for name in _SHARES:
        _check_share(f"trainer.{name}", options.get(name))
    if options.get("gradient_clip_val") is not None:
        check_number("trainer.gradient_clip_val", options["gradient_clip_val"])
    _check_word(options, "gradient_clip_algorithm", ("norm", "value"))
    _check_word(options, "profiler", _PROFILERS)
    _check_interval(options.get("val_check_interval"), options.get("check_val_every_n_epoch"))
    if isinstance(time := options.get("max_time"), str) and not re.fullmatch(_TIME, time):
        raise InputError(f"trainer.max_time: '{time}' is no time; write DD:HH:MM:SS")
    if options.get("barebones"):
        raise InputError(
            "trainer.barebones: it leaves out what a run writes; set it to false, and measure "
            "speed by moezoo bench"
        )
    if isinstance(options.get("fast_dev_run"), int):
        check_int("trainer.fast_dev_run", int(options["fast_dev_run"]), minimum=0)
    on_gpu = _check_accelerator(options.get("accelerator"))
    _check_devices(options.get("devices"), on_gpu)
    _check_strategy(options.get("strategy"), on_gpu)
    _check_precision(options.get("precision"), on_gpu)


def check_validation_interval(options: Mapping[str, Any]) -> None:
    """Refuse validations within optimizer steps: ``best.ckpt`` is to be resumed from exactly.

    Raises:
        InputError: the interval is not a multiple of the batches of a step.
    """
    interval, accumulate = options["val_check_interval"], options["accumulate_grad_batches"]
    if isinstance(interval, int) and interval % accumulate:
        raise InputError(
            f"trainer.val_check_interval: {interval} batches is not a multiple of "
            f"trainer.accumulate_grad_batches {accumulate}; validation would interrupt a step"
        )


def is_refusal(error: Exception) -> bool:
    """Return whether Lightning itself raised an error, as it does to refuse a setting."""
    if isinstance(error, MisconfigurationException):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return isinstance(error, ValueError) and module.partition(".")[0] == "lightning"


def reword(error: Exception) -> str:
    """Return a line on what Lightning refuses, after the trainer's option that it speaks of."""
    text = " ".join(str(error).split()).replace("`", "")
    words = re.findall(r"\w+", text)
    known = inspect.signature(Trainer).parameters
    option = next((f".{word}" for word in words if "_" in word and word in known), "")
    return f"trainer{option}: {text}"


def _check_share(field: str, value: Any) -> None:
    """Check a number of batches, or a share of all."""
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise InputError(
                f"{field}: {value:g} is out of range; give a share from 0.0 to 1.0, or a whole "
                "number of batches"
            )
    elif value is not None:
        check_int(field, value, minimum=0)


def _check_word(options: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    value = options.get(name)
    if isinstance(value, str) and value not in choices:
        raise InputError(f"trainer.{name}: '{value}' is not known{nearest(value, choices)}")


def _check_interval(value: Any, epochs: Any) -> None:
    """Check after how many batches, or what share of an epoch, or what time it is validated."""
    field = "trainer.val_check_interval"
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise InputError(
                f"{field}: {value:g} is out of range; give a whole number of batches, or a share "
                "of an epoch up to 1.0"
            )
        if epochs is None:
            raise InputError(
                f"{field}: {value:g} is a share of an epoch, and validation does not follow "
                "epochs; give a whole number of batches, or set trainer.check_val_every_n_epoch "
                "to 1"
            )
    elif isinstance(value, str):
        if not re.fullmatch(_TIME, value):
            raise InputError(
                f"{field}: '{value}' is no time; write DD:HH:MM:SS, or a whole number of batches"
            )
    elif isinstance(value, int) and (isinstance(value, bool) or value < 1):
        raise InputError(
            f"{field}: {value} is out of range; give a whole number of batches ≥ 1, and to leave "
            "out validation set trainer.limit_val_batches to 0"
        )


def _check_accelerator(value: Any) -> bool:
    """Return whether the run is on a GPU, or might be."""
    field = "trainer.accelerator"
    if not isinstance(value, str):
        return value is not None or torch.cuda.is_available() or torch.backends.mps.is_available()
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if value not in known:
        raise InputError(f"{field}: '{value}' is not known{nearest(value.lower(), known)}")
    usable = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "tpu": importlib.util.find_spec("torch_xla") is not None,
    }
    usable["gpu"] = usable["cuda"] or usable["mps"]
    if not usable.get(value, True):
        kind = {"gpu": "GPU", "cuda": "CUDA GPU", "mps": "Apple GPU", "tpu": "TPU"}[value]
        raise InputError(f"{field}: there is no usable {kind} here; give cpu, or auto")
    return usable["gpu"] if value == "auto" else value not in ("cpu", "tpu")


def _check_devices(value: Any, on_gpu: bool) -> None:
    field = "trainer.devices"
    if value in (None, "auto"):
        return
    text = str(value).replace(" ", "")
    listed = isinstance(value, list) or "," in text
    if not on_gpu:
        if not re.fullmatch(r"[1-9]\d*", text):
            raise InputError(
                f"{field}: {value} is no number of processes; on a CPU give a whole number ≥ 1, "
                "or auto"
            )
        return
    if not listed and not re.fullmatch(r"-1|[1-9]\d*", text):
        raise InputError(
            f"{field}: {value} is no number of GPUs; give a whole number ≥ 1, their numbers as in "
            "[0, 1], or auto for all"
        )
    if torch.cuda.is_available():
        there = torch.cuda.device_count()
        numbers = [int(n) for n in re.findall(r"\d+", text)] if listed else []
        if (not listed and int(text) > there) or any(number >= there for number in numbers):
            raise InputError(
                f"{field}: {value} asks for more than the {there} GPUs that are here; give fewer, "
                "or auto for all"
            )


def _check_strategy(value: Any, on_gpu: bool) -> None:
    if not isinstance(value, str) or "." in value:
        return
    known = ["auto", *StrategyRegistry.available_strategies()]
    if value not in known:
        near = nearest(value, known) if len(value) > 3 else ""
        fix = near if "did you mean" in near else "; e.g. auto, ddp, fsdp2 or deepspeed_stage_2"
        raise InputError(f"trainer.strategy: '{value}' is not known{fix}")
    if value.startswith("fsdp") and value != "fsdp2" and not on_gpu:
        raise InputError(
            f"trainer.strategy: {value} needs a GPU, and there is none in this run; give fsdp2, "
            "ddp or auto"
        )


def _check_precision(value: Any, on_gpu: bool) -> None:
    """Refuse what would be replaced by another precision, or needs what is not installed."""
    field, text = "trainer.precision", str(value)
    if text in _HALF and not on_gpu:
        raise InputError(
            f"{field}: {text} computes in fp16, which needs a GPU, and there is none in this run; "
            "give bf16-mixed or 32-true"
        )
    missing = importlib.util.find_spec("transformer_engine") is None
    if missing and text.startswith("transformer-engine"):
        raise InputError(
            f"{field}: {text} needs transformer_engine, which is not installed; give bf16-mixed, "
            "or pip install transformer_engine"
        )
