"""Predicted bytes of collectives against those that two processes make, counted one by one."""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moezoo_models import MoezooConfig, MoezooForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from counting import CountingMode

# Name of a case: kind of model, layout, micro-batches per step, activation checkpointing.
CASES = {
    "dense ddp": ("dense", "ddp", 1, False),
    "moe ddp": ("moe", "ddp", 3, False),
    "moe ddp checkpointed": ("moe", "ddp", 1, True),
    "peer ddp": ("peer", "ddp", 1, False),
    "memory_plus ddp": ("memory_plus", "ddp", 1, False),
    "pair shared": ("pair", "shared", 1, False),  # every token goes to both processes
    "weighted inputs shared": (
        "weighted inputs",
        "shared",
        1,
        False,
    ),  # each choice is sent by itself
    "pair shared checkpointed": ("pair", "shared", 1, True),
}


def count_step(model: MoezooForCausalLM, layout: str, micro_batches: int) -> dict[str, int]:
    """Count one step; of DDP the third, by when it has made its buckets."""
    wrapped: Any
    if layout == "shared":
        from torch.distributed.device_mesh import init_device_mesh

        from moezoo.parallel import shard_experts

        shard_experts(model, init_device_mesh("cpu", (2,)))
        wrapped = model
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3 if layout == "ddp" else 1):
        with CountingMode() as counted:
            for number in range(micro_batches):
                if layout == "ddp":
                    wrapped.require_backward_grad_sync = number == micro_batches - 1
                ids = torch.randint(75, (3, 21))
                wrapped(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
    return dict(counted.bytes)


def run_rank(rank: int, path: str, cases: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = {}
    for name, (config, layout, micro_batches, checkpointing) in json.loads(cases).items():
        model = MoezooForCausalLM(MoezooConfig(**config)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found[name] = count_step(model, layout, micro_batches)
    if rank == 0:
        torch.save(found, path + ".counted")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counted(server, tmp_path_factory, make_config) -> dict[str, dict[str, int]]:
    """Return the bytes of every case, counted in one launch of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    path = str(folder / "rendezvous")
    cases = {name: (make_config(case[0]), *case[1:]) for name, case in CASES.items()}
    server.call_ranks(2, run_rank, path, json.dumps(cases), folder=folder)
    return torch.load(path + ".counted", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_counted(name, counted, make_plan):
    kind, layout, micro_batches, checkpointing = CASES[name]
    shared = 2 if layout == "shared" else 1
    plan = make_plan(
        kind,
        "ddp" if shared == 1 else "fsdp2",
        shared,
        accumulation=micro_batches,
        activation_checkpointing=checkpointing,
    )
    predicted: Counter[str] = Counter()
    for one in plan.collectives():
        predicted[one.kind] += one.size
    if layout == "shared":  # what FSDP2 sends is counted apart
        assert predicted["all_to_all"] == counted[name]["all_to_all"]
    else:
        assert dict(predicted) == counted[name]
