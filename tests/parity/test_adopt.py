"""Every mixture block of the installed transformers: held exactly, or not, with a reason."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import adopt_families as families  # noqa: E402 - also a program of its own

import moezoo  # noqa: E402
from moezoo_models.adopt import reasons, table  # noqa: E402

CASES = {name: (block, change) for name, block, change in families.cases()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_all_gradients_are_theirs(case, dtype):
    assert families.difference(*CASES[case], dtype) <= 1e-6


MODELS = Path(transformers.__file__).parent / "models"
# Families whose configuration names the experts of another family's text model.
WRAPPERS = {
    "nemotron3_5_transcribe": "nemotron_h",
}
NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_topk")


def families_with_experts() -> set[str]:
    """List the families whose configuration names experts."""
    found = set()
    for file in MODELS.glob("*/configuration_*.py"):
        text = file.read_text(encoding="utf-8")
        if any(name in text for name in NAMES):
            found.add(file.parent.name)
    return found


def blocks_with_experts() -> set[str]:
    """List the classes that keep experts, by module path and name."""
    found = set()
    for file in MODELS.glob("*/modeling_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "experts" in set(kept(node)):
                module = f"transformers.models.{file.parent.name}.{file.stem}"
                found.add(f"{module}.{node.name}")
    return found


def kept(node: ast.ClassDef):
    """List the names that a class assigns to itself."""
    for inner in ast.walk(node):
        stored = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
        if stored and isinstance(inner.value, ast.Name) and inner.value.id == "self":
            yield inner.attr


def test_every_family_with_experts_is_held_or_refused_with_a_reason():
    known = {path.split(".")[2] for path in (*table.BY_CLASS, *reasons.REASONS)}
    assert len(families_with_experts()) > 60
    assert families_with_experts() - known - WRAPPERS.keys() == set()
    assert set(WRAPPERS.values()) <= known


def test_every_class_with_experts_is_held_or_refused_with_a_reason():
    known = {*table.BY_CLASS, *reasons.REASONS, *reasons.ATTENTION}
    assert len(blocks_with_experts()) > 60
    assert blocks_with_experts() - known == set()


# Classes of other families that are named as parts of mixtures are.
NAMESAKES = {"GraniteDoclingDensityRouter": "chooses how finely an image is read"}


def families_with_parts() -> set[tuple[str, str]]:
    """List the families with a class that is named as parts of mixtures are, and the class."""
    found = set()
    for file in MODELS.glob("*/modeling_*.py"):
        names = re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        parts = (
            name
            for name in names
            if re.search(r"Experts?(?![a-z])|M[oO][eE](?![a-z])|Router", name)
        )
        found |= {(file.parent.name, name) for name in parts}
    return found


def test_every_family_with_parts_of_a_mixture_is_known_whatever_its_configuration_says():
    known = {path.split(".")[2] for path in (*table.BY_CLASS, *reasons.REASONS)}
    found = families_with_parts()
    assert len({family for family, _ in found}) > 60
    assert {name for family, name in found if family not in known} == NAMESAKES.keys()


@pytest.mark.parametrize("family", ["mixtral", "jetmoe", "gemma4", "zaya", "vitpose_backbone"])
def test_a_family_that_no_list_has_is_noticed(family, monkeypatch):
    """What a new release will be: each search by itself finds a family that is left out."""
    for owner, name in ((table, "BY_CLASS"), (reasons, "REASONS")):
        left = {p: v for p, v in getattr(owner, name).items() if p.split(".")[2] != family}
        monkeypatch.setattr(owner, name, left)
    noticed = 0
    for search in (
        test_every_family_with_experts_is_held_or_refused_with_a_reason,
        test_every_class_with_experts_is_held_or_refused_with_a_reason,
        test_every_family_with_parts_of_a_mixture_is_known_whatever_its_configuration_says,
    ):
        try:
            search()
        except AssertionError:
            noticed += 1
    assert noticed >= 2


def test_the_table_names_classes_that_are_there():
    for path in (*table.BY_CLASS, *reasons.REASONS, *reasons.ATTENTION):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    assert not table.BY_CLASS.keys() & reasons.REASONS.keys()
    assert len(table.BY_CLASS) == len(table.BLOCKS)


def test_the_page_lists_what_is_held():
    assert families.rows(families.PAGE.read_text(encoding="utf-8")) == families.rows(
        families.page()
    )


def test_the_tables_of_routers_are_those_of_the_code():
    written = families.ROUTERS.read_text(encoding="utf-8")
    assert families.with_tables(written) == written


@pytest.mark.parametrize("name", families.CONVENTIONS)
def test_a_division_that_is_optional_stands_in_brackets(name):
    formula = families.CONVENTIONS[name].formula
    if " / " in formula.replace("[/", "") or "[/" in formula:
        optional = "normalize: false` or `true" in families.options_of(name)
        assert ("[/" in formula) == optional, formula


@pytest.mark.parametrize("case", CASES)
def test_in_bf16_most_tokens_are_theirs(case):
    """Routers compute in fp32 here, and some in bf16 there: close choices differ."""
    block, change = CASES[case]
    model = families.Model(families.build(block, change, torch.bfloat16))
    hidden = torch.randn(3, 43, families.D, generator=torch.Generator().manual_seed(1)) + 0.7
    hidden = hidden.bfloat16()
    with torch.no_grad():
        theirs = model(hidden)
        moezoo.adopt(model)
        ours = model(hidden)
    assert ours.dtype == theirs.dtype
    off = (ours - theirs).float().abs().amax(-1) / theirs.float().abs().max()
    assert off.median() < 0.01
    assert (off > 0.03).float().mean() < 0.05
