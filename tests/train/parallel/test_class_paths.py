"""Strategies are found where configurations of earlier versions name them."""

import importlib

import pytest

from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.parallel.zero import ZeROStrategy


@pytest.mark.parametrize(
    ("path", "strategy"),
    [
        ("moezoo_train.strategies.FSDP2Strategy", FSDP2Strategy),
        ("moezoo_train.zero.ZeROStrategy", ZeROStrategy),
    ],
)
def test_paths_of_earlier_versions_lead_to_the_strategies(path, strategy):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is strategy
