"""transformers is told everywhere that no code of a checkpoint is to be run; it would ask."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "moezoo", "models", "train")
LOADERS = ("from_pretrained", "from_config")


def calls():
    """Find every call of a loader of an ``Auto`` class of transformers."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = ast.unparse(node.func.value)
                if node.func.attr in LOADERS and owner.rpartition(".")[2].startswith("Auto"):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node


CALLS = dict(calls())


def test_there_are_such_calls():
    assert len(CALLS) >= 5


@pytest.mark.parametrize("place", CALLS)
def test_no_remote_code(place):
    options = {keyword.arg: keyword.value for keyword in CALLS[place].keywords}
    trusted = options.get("trust_remote_code")
    assert isinstance(trusted, ast.Constant), f"{place} leaves it open"
    assert trusted.value is False
