"""What test_zero.py runs in two processes: DeepSpeed's ZeRO on CPUs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import distributed_cases as cases

from moezoo.errors import InputError
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.parallel.zero import ZeROStrategy
from moezoo_train.run.cli import run

STAGES = (1, 2, 3)
LAYERS = ("dense", "moe", "peer", "memory")
TWO_PROCESSES = [(layer, stage) for layer in LAYERS for stage in STAGES]
TWO_PROCESSES += [("accumulation", stage) for stage in STAGES]
# What stages 1 and 2 do between a forward pass and its backward pass is nothing.
TWO_PROCESSES += [("activation checkpointing", 3), ("bf16", 2), ("bf16", 3)]
TWO_PROCESSES += [("biased", 2), ("biased", 3)]
CASES = cases.CASES
INTERRUPTED = cases.Case("memory", 4)  # clip groups, learning rates and decay of their own
READINGS: list[tuple[str | int, str | int]] = [(stage, stage) for stage in STAGES]
READINGS += [(1, 3), (3, 2), ("fsdp2", 2), (3, "fsdp2")]


def half(folder: Path, writer: str | int) -> Path:
    """Name the checkpoint of an interrupted run."""
    return folder / f"half of {writer}.ckpt"


def not_finite(stage: int, folder: Path) -> str:
    """Train by infinite steps until it is noticed, and give the message."""
    huge = cases.OptimizerConfig(lr=1e30, eps=1e-3)
    try:
        cases.train(cases.Case("dense", 6, huge), ZeROStrategy(stage), folder)
    except InputError as error:
        return str(error)
    return "nothing was noticed"


def main(folder: Path, arguments: list[str]) -> None:
    """Run everything that wants two processes."""
    for name, stage in TWO_PROCESSES:
        result = cases.train(CASES[name], ZeROStrategy(stage), folder)
        cases.keep(folder, f"{name}, {stage}", result)
    for stage in STAGES:
        whole = cases.train(INTERRUPTED, ZeROStrategy(stage), folder, save=half(folder, stage))
        cases.keep(folder, f"whole, {stage}", whole)
        cases.keep(folder, f"not finite, {stage}", not_finite(stage, folder))
    path = half(folder, "fsdp2")
    directory = FSDP2Strategy(save_distributed_checkpoint=True)
    cases.train(INTERRUPTED, directory, folder, steps=cases.HALF, save=path)
    for writer, reader in READINGS:
        strategy = FSDP2Strategy() if reader == "fsdp2" else ZeROStrategy(reader)
        resumed = cases.train(INTERRUPTED, strategy, folder, resume=half(folder, writer))
        cases.keep(folder, f"{writer} to {reader}", resumed)
    run(arguments)


if __name__ == "__main__":
    cases.run_program(main)
