"""Predicted bytes against those of models that are really there."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from moezoo.bench.case import Contender
from moezoo.bench.memory import saved_bytes
from moezoo.routing.query_network import QueryNetwork
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.plan.choices import refusal
from moezoo_train.plan.layouts import Plan
from moezoo_train.plan.trace import Trace, trace

KINDS = ("dense", "moe", "before", "peer", "memory_plus")
MUON = OptimizerConfig("muon")


def autocast(numbers: str):
    mixed = numbers == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


def measure_saved(module, batch, numbers: str) -> int:
    contender = Contender(
        lambda: module(batch).loss,
        dict(module.named_parameters()),
        constants=tuple(module.buffers()),
        within=lambda: autocast(numbers),
    )
    return saved_bytes(contender)


@pytest.mark.parametrize(
    ("numbers", "checkpointing"),
    [("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_activations(
    kind, numbers, checkpointing, make_setup, make_module, batch, monkeypatch
):
    # One process on a CPU has a shorter way to normalise queries than the many that are planned.
    monkeypatch.setattr(QueryNetwork, "_in_one_pass", lambda *_: False)
    setup = make_setup(kind, numbers, activation_checkpointing=checkpointing)
    module = make_module(kind, activation_checkpointing=checkpointing)
    found = trace(setup, cpu=True)
    assert found.activations + found.weight_copies == measure_saved(module, batch, numbers)
    assert bool(found.block) == checkpointing
    if numbers == "bf16-mixed" and not checkpointing:
        attention = sum(p.numel() for n, p in module.named_parameters() if "self_attn" in n)
        assert found.weight_copies >= 2 * attention


def test_blocks_of_a_kind_count_as_often_as_there_are(make_setup, make_module, batch):
    depth = {"num_layers": 9}
    found = trace(make_setup("memory_plus", **depth), cpu=True)
    module = make_module("memory_plus", **depth)
    assert found.activations == measure_saved(module, batch, "32-true")


def state_bytes(value) -> int:
    if isinstance(value, dict):
        return sum(state_bytes(part) for part in value.values())
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


@pytest.mark.parametrize("numbers", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", [OptimizerConfig(), MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_gradients_and_optimizer_state(
    kind, optimizer, numbers, make_setup, make_module, batch
):
    setup = make_setup(kind, numbers, optimizer=optimizer)
    memory = Plan(setup, Trace(), "ddp", gpus=1).memory()
    module = make_module(kind, optimizer=optimizer)
    with autocast(numbers):
        loss = module(batch).loss
    loss.backward()
    built = build_optimizer(module.model, optimizer)
    built.step()
    held = [*module.parameters(), *module.buffers()]
    assert memory.parameters == sum(state_bytes(tensor) for tensor in held)
    assert memory.gradients == sum(state_bytes(p.grad) for p in module.parameters())
    assert memory.optimizer == sum(state_bytes(state) for state in built.state.values())


def test_sgd_has_no_state_and_is_not_divided(make_setup):
    setup = make_setup("dense", optimizer=OptimizerConfig("sgd"))
    assert Plan(setup, Trace(), "ddp", gpus=1).memory().optimizer == 0
    assert refusal(setup, "ddp", 4) is None
    assert "sgd has not been tried with ZeRO" in refusal(setup, "zero2", 4)


def test_frozen_parameters_have_no_gradient_and_no_state(make_setup):
    setup = make_setup("dense")
    whole = Plan(setup, Trace(), "ddp", gpus=2).memory()
    setup.model.model.embed_tokens.requires_grad_(False)
    memory = Plan(replace(setup), Trace(), "ddp", gpus=2).memory()
    embedding = 4 * 75 * 32
    assert memory.parameters == whole.parameters
    assert memory.gradients == whole.gradients - embedding
    assert memory.optimizer == whole.optimizer - 2 * embedding - 4
    assert memory.communication == whole.communication - embedding


def test_zero_divides_the_bytes_of_fp32_parameters(make_setup):
    """4 + 4 + 12 bytes per parameter, in stage 3 4 + 4 + 8, divided by N in turn."""
    setup = make_setup("dense", "bf16-mixed")
    buffers = sum(b.nbytes for b in setup.buffers)
    stages = {"zero1": (12, 1, 1, 4), "zero2": (12, 1, 4, 4), "zero3": (8, 4, 4, 4)}
    for layout, (state, *parts) in stages.items():
        memory = Plan(setup, Trace(), layout, gpus=4).memory()
        static = (memory.parameters - buffers, memory.gradients, memory.optimizer)
        for held, width, divisor in zip(static, (4, 4, state), parts, strict=True):
            assert held == pytest.approx(width * setup.size / divisor, rel=1e-3)


def test_expert_parallelism_divides_the_experts(make_setup):
    """Two replicas of a group of three: everything in three shards, experts among the three too."""
    setup = make_setup("moe", "bf16-mixed")
    found = trace(setup, cpu=True)
    whole = Plan(setup, found, "fsdp2", gpus=6, replicas=2).memory()
    spread = Plan(setup, found, "fsdp2", gpus=6, expert_parallel=3, replicas=2).memory()
    assert spread.parameters == whole.parameters
    assert spread.optimizer == whole.optimizer
    experts = 4 * 3 * (3 * 24 * 32)  # layers, experts, numbers of a gated expert
    assert whole.weight_copies - spread.weight_copies == pytest.approx(2 * experts * 2 / 3)
    tokens = 3 * 21 * 2 * 32 * 2  # a token goes to two experts, in bf16
    gathered = 4 * 4 * experts // 4 * 2 // 3  # of the largest block, four times in fp32
    assert whole.communication - spread.communication == gathered - 2 * 4 * tokens
