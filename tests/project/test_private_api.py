"""Private names of other libraries are used in `adapters/` alone: a release breaks one file.

A name is private that begins with one underscore. It is one's own on `self`, `cls` and a class or
module of this project, and foreign on anything else, `super()` included.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = ["models", "train"]
"""Folders that keep to this."""
OURS = ("moezoo", "moezoo_kernels", "moezoo_models", "moezoo_train")
PUBLISHED = {"_asdict", "_fields", "_make", "_replace"}
"""Methods of named tuples, which Python documents."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree: ast.Module) -> set[str]:
    """Return what stands for something of this project: its classes, and what is imported of it."""
    names = {"self", "cls"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.partition(".")[0]
                for alias in node.names
                if alias.name.partition(".")[0] in OURS
            }
    return names


def is_own(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def foreign(source: str) -> list[str]:
    """Return the foreign private names that a module uses, in the order of its lines."""
    tree = ast.parse(source)
    names, found = own_names(tree), []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value, attr) if is_private(attr) and not is_own(value, names):
                if attr not in PUBLISHED:
                    found.append((node.lineno, ast.unparse(node)))
            case ast.Call(
                ast.Name("getattr" | "setattr" | "hasattr" | "delattr"),
                [value, ast.Constant(str() as attr), *_],
            ) if is_private(attr) and not is_own(value, names):
                found.append((node.lineno, ast.unparse(node)))
            case ast.Import(aliases):
                found += [(node.lineno, a.name) for a in aliases if is_foreign_path(a.name)]
            case ast.ImportFrom(module, aliases) if not node.level:
                paths = [f"{module}.{alias.name}" for alias in aliases]
                found += [(node.lineno, path) for path in paths if is_foreign_path(path)]
    return [name for _, name in sorted(found)]


def is_foreign_path(path: str) -> bool:
    first, *others = path.split(".")
    return first not in (*OURS, "__future__") and any(is_private(part) for part in (first, *others))


@pytest.mark.parametrize("root", ROOTS)
def test_foreign_private_names_stand_in_adapters(root):
    files = [p for p in (ROOT / root).rglob("*.py") if "adapters" not in p.relative_to(ROOT).parts]
    assert files
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := foreign(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_adapters_use_nothing_in_vain():
    for root in ROOTS:
        for path in (ROOT / root).rglob("adapters/[!_]*.py"):
            assert foreign(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model._init_weights(part)", ["model._init_weights"]),
        ("self.config._attn_implementation", ["self.config._attn_implementation"]),
        ("super()._apply(fn)", ["super()._apply"]),
        ("setattr(config, '_experts', 1)", ["setattr(config, '_experts', 1)"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch._inductor import config", ["torch._inductor.config"]),
        ("from transformers import _LazyModule", ["transformers._LazyModule"]),
        ("import _socket", ["_socket"]),
        ("self._own; cls._own; getattr(self, '_own')", []),
        ("class Own:\n  pass\nOwn._made", []),
        ("from moezoo import convert\nconvert._cut", []),
        ("from moezoo._parts import one", []),
        ("pair._replace(a=1).__dict__", []),
        ("from __future__ import annotations", []),
    ],
)
def test_foreign_private_names_are_found(source, names):
    assert foreign(source) == names


def inherited(sources: list[str]) -> set[str]:
    """Return private attributes of `self` that no class of the sources defines or assigns."""
    used, own = set(), set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        match node:
            case ast.FunctionDef(name):
                own.add(name)
            case ast.Name(name, ast.Store()):
                own.add(name)
            case ast.Attribute(ast.Name("self" | "cls"), attr, context) if is_private(attr):
                (own if isinstance(context, ast.Store) else used).add(attr)
    return used - own


def test_no_class_of_train_uses_what_it_inherits_privately():
    files = [p for p in (ROOT / "train").rglob("*.py") if "adapters" not in p.parts]
    assert inherited([path.read_text(encoding="utf-8") for path in files]) == set()


def test_inherited_private_names_are_found():
    theirs = "class A(B):\n    def f(self):\n        return self._theirs"
    assert inherited([theirs]) == {"_theirs"}
    assert inherited([theirs, "self._theirs = 1"]) == set()


@pytest.mark.parametrize("root", ROOTS)
def test_adapters_are_described(root):
    for path in (ROOT / root).rglob("adapters/[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert ast.get_docstring(node), f"{path}: {node.name}"
