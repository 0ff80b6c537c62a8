"""Tiny models of four kinds, each really there or as shapes only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from moezoo import PEER, DenseFFN, MemoryPlus, RouterOptions, SparseMoE, WeightOptions
from moezoo_train.plan.layouts import Plan
from moezoo_train.plan.setup import Setup, precision
from moezoo_train.plan.trace import trace
from moezoo_train.run.module import FFNRule, LanguageModel

KINDS: dict[str, Any] = {
    "dense": {"ffn": DenseFFN},
    "moe": {"ffn": partial(SparseMoE, num_experts=3, d_expert=24, num_shared_experts=1)},
    "odd": {"ffn": partial(SparseMoE, num_experts=3, d_expert=21)},
    "four": {"ffn": partial(SparseMoE, num_experts=4, d_expert=24)},
    "eight": {"ffn": partial(SparseMoE, num_experts=8, d_expert=24)},
    "before": {
        "ffn": partial(SparseMoE, num_experts=3, d_expert=24),
        "router_input": "pre_attention",
        "ffn_rules": [FFNRule([1, 3], partial(SparseMoE, num_experts=3, d_expert=24))],
    },
    "pair": {"ffn": partial(SparseMoE, num_experts=2, top_k=2, d_expert=24)},
    "weighted inputs": {
        "ffn": partial(
            SparseMoE,
            num_experts=4,
            top_k=4,
            d_expert=24,
            router=RouterOptions(weights=WeightOptions(apply_to="input")),
        )
    },
    "peer": {"ffn": partial(PEER, num_experts=36, num_heads=2, top_k=3, query_norm="batch")},
    "memory_plus": {
        "ffn": DenseFFN,
        "ffn_rules": [FFNRule([1, 3], partial(MemoryPlus, num_keys=7, top_k=4, num_heads=2))],
    },
}
BATCH, LENGTH = 3, 21


def build(kind: str, **options: Any) -> LanguageModel:
    defaults = {"vocab_size": 75, "d_model": 32, "num_layers": 4, "num_heads": 4}
    return LanguageModel(**{**defaults, "num_kv_heads": 2, **KINDS[kind], **options})


@pytest.fixture
def make_setup() -> Callable[..., Setup]:
    """Return a function that plans a model of a kind without its weights."""

    def make(kind: str, numbers: str = "32-true", accumulation: int = 1, **options: Any) -> Setup:
        with torch.device("meta"):
            module = build(kind, **options)
        return Setup.of(module, precision(numbers), BATCH, LENGTH, accumulation)

    return make


@pytest.fixture
def make_plan(make_setup) -> Callable[..., Plan]:
    """Return a function that plans two processes."""

    def make(kind: str, layout: str, shared: int = 1, **options: Any) -> Plan:
        setup = make_setup(kind, **options)
        return Plan(setup, trace(setup, cpu=True), layout, gpus=2, expert_parallel=shared)

    return make


@pytest.fixture
def make_module() -> Callable[..., LanguageModel]:
    """Return a function that builds a model of a kind."""
    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(75, (BATCH, LENGTH + 1))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


@pytest.fixture(scope="module")
def make_config() -> Callable[[str], dict[str, Any]]:
    """Return a function that describes a model of a kind, for another process to build."""

    def describe(kind: str) -> dict[str, Any]:
        with torch.device("meta"):
            config = build(kind).model.config.to_dict()
        keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        keys += ("num_key_value_heads", "tie_word_embeddings", "rope_parameters", "ffn")
        return {key: config[key] for key in keys}

    return describe
