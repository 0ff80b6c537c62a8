"""What test_zero.py runs in two processes, launched by torchrun: DeepSpeed's ZeRO on CPUs."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import distributed_cases as cases

from moezoo.errors import InputError
from moezoo_train.cli import run
from moezoo_train.progress import quiet_lightning
from moezoo_train.strategies import FSDP2Strategy
from moezoo_train.zero import ZeROStrategy

STAGES = (1, 2, 3)
LAYERS = ("dense", "moe", "peer", "memory")
INTERRUPTED = cases.Case("memory", 4)  # clip groups, learning rates and decay of their own
READINGS = [(stage, stage) for stage in STAGES] + [(1, 3), (3, 2)]


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

    def keep(name: str, result) -> None:
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")

    for stage in STAGES:
        for layer in LAYERS:
            keep(f"{layer}, {stage}", cases.train(cases.CASES[layer], ZeROStrategy(stage), folder))
        for name in ("accumulation", "activation checkpointing", "bf16"):
            keep(f"{name}, {stage}", cases.train(cases.CASES[name], ZeROStrategy(stage), folder))
        keep(f"whole, {stage}", cases.train(INTERRUPTED, ZeROStrategy(stage), folder))
        path = half(folder, stage)
        cases.train(INTERRUPTED, ZeROStrategy(stage), folder, steps=cases.HALF, save=path)
        keep(f"not finite, {stage}", not_finite(stage, folder))
    path = half(folder, "fsdp2")
    directory = FSDP2Strategy(save_distributed_checkpoint=True)
    cases.train(INTERRUPTED, directory, folder, steps=cases.HALF, save=path)
    for writer, reader in [*READINGS, ("fsdp2", 2)]:
        resumed = cases.train(
            INTERRUPTED, ZeROStrategy(reader), folder, resume=half(folder, writer)
        )
        keep(f"{writer} to {reader}", resumed)
    resumed = cases.train(INTERRUPTED, FSDP2Strategy(), folder, resume=half(folder, 3))
    keep("3 to fsdp2", resumed)
    run(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_lightning()
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()
