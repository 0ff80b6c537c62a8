"""The page of surprises: every script of findings/, and tests that are there."""

import re
from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "surprises.md").read_text(encoding="utf-8")


def test_the_page_has_every_script_once_and_no_other():
    linked = re.findall(r"\(\.\./findings/(\w+\.sh)\)", PAGE)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "findings").glob("*.sh"))


def test_tests_that_it_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) >= 2
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_versions_are_those_of_the_scripts():
    for name, version in re.findall(r"(\w+) (\d+\.\d+\.\d+)", PAGE.partition("## ")[0]):
        assert any(
            f"{name.lower()} {version}" in path.read_text(encoding="utf-8").lower()
            for path in (ROOT / "findings").glob("*.sh")
        ), (name, version)


def test_a_balance_loss_over_all_layers_hides_layers_that_are_uneven():
    uneven = torch.tensor([[9.0, -9.0]]).repeat(8, 1)  # all tokens of a layer to one expert
    opposite = uneven.flip(1)
    assert load_balancing_loss_func((uneven,), 2, 1).item() == pytest.approx(2.0, abs=1e-3)
    assert load_balancing_loss_func((uneven, opposite), 2, 1).item() == pytest.approx(1.0, abs=1e-3)
