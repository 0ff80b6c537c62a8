"""Every mixture block of the installed transformers: held exactly, or not, with a reason."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import adopt_families as families  # noqa: E402 - also a program of its own

CASES = {name: (block, change) for name, block, change in families.cases()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_all_gradients_are_theirs(case, dtype):
    assert families.difference(*CASES[case], dtype) <= 1e-6
