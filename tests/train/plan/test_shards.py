"""Predicted shards and bytes against those of the trainer's own, among eight simulated processes.

The processes of torch's ``fake`` group send nothing, so that one is enough to count what all do.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moezoo import parallel
from moezoo_train.parallel.distributed import parallelize
from moezoo_train.parallel.fsdp2 import parallel_dims
from moezoo_train.plan.layouts import Plan
from moezoo_train.plan.trace import trace

sys.path.insert(0, str(Path(__file__).parent))

from counting import CountingMode

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional")
PROCESSES = 8
# Kind of model, expert_parallel, replicas, micro-batches, activation checkpointing.
CASES = {
    "dense": ("dense", 1, 1, 1, False),
    "dense checkpointed": ("dense", 1, 1, 1, True),
    "peer": ("peer", 1, 1, 1, False),
    "replicas": ("moe", 1, 2, 2, False),
    "rows": ("moe", 1, 1, 1, False),  # eight processes do not divide three experts
    "padded": ("odd", 1, 1, 1, False),  # nor 42 rows
    "shared": ("eight", 2, 1, 2, False),
    "shared, rows": ("four", 2, 1, 1, False),
    "shared, checkpointed": ("four", 2, 1, 1, True),
    "shared by all": ("eight", 8, 1, 1, False),
    "shared in replicas": ("four", 2, 2, 2, False),
    "shared by a replica": ("four", 4, 2, 1, False),
    "replicas of one": ("moe", 1, 8, 1, False),
}


class Here:
    """Tokens that stay where they are, as if each process sent its own to itself."""

    def __init__(self, x, indices, weights, num_experts, mesh) -> None:
        own = num_experts // mesh.size()
        self.x, self.indices, self.weights = x, indices % own, weights
        self.assignments = indices.numel()

    def combine(self, outputs):
        return outputs


@contextmanager
def processes():
    """Begin and end eight processes; give their mesh."""
    dist.init_process_group("fake", rank=0, world_size=PROCESSES)
    try:
        yield init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data_parallel",))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_shards_and_sends_what_is_planned(name, make_setup, make_module, monkeypatch):
    kind, shared, replicas, micro_batches, checkpointing = CASES[name]
    options = {"num_layers": 2, "activation_checkpointing": checkpointing}
    setup = make_setup(kind, accumulation=micro_batches, **options)
    plan = Plan(setup, trace(setup, cpu=True), "fsdp2", PROCESSES, shared, replicas)
    monkeypatch.setattr(parallel, "dispatch_tokens", Here)
    with processes() as mesh:
        model = make_module(kind, **options).model
        parallelize(model, parallel_dims(mesh, shared, replicas, torch.device("cpu")))
        tensors = [*model.parameters(), *model.buffers()]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        with CountingMode() as counted:
            for _ in range(micro_batches):
                ids = torch.randint(75, (3, 21))
                model(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
    assert plan.memory().parameters == sum(t.nbytes for t in local)
    predicted: Counter[str] = Counter()
    for one in plan.collectives():
        predicted[one.kind] += one.size
    predicted.pop("all_to_all", None)  # counted where tokens travel
    assert predicted == counted.bytes
