"""A function's signature and docstring, read from its file without importing what it needs to run.

A help page needs only these, and the modules of commands import torch, transformers and more, which
takes seconds. Of a module's source the function is defined, and before it what its annotations and
defaults name, and nothing else: imports from our own packages are followed into their files in the
same way, and others are carried out.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_OWN = ("moezoo", "moezoo_models", "moezoo_train")


def signature_of(path: str) -> Callable[..., Any]:
    """Return a function of the same signature and docstring, not to be called.

    Args:
        path: ``module:function``, both ours; the function is at the module's top level.

    Raises:
        OSError: the module's source is not there.
    """
    module, _, name = path.partition(":")
    function: Callable[..., Any] = _Excerpt(module).get(name)
    return function


class _Excerpt:
    """Some of the top-level names of a module of ours.

    Args:
        module: its dotted name.
    """

    def __init__(self, module: str) -> None:
        self._file = _source_file(module)
        # The parser looks names up where a function says it is from, which must not be the module.
        self._module = ModuleType(f"excerpt_of_{module.replace('.', '_')}")
        sys.modules[self._module.__name__] = self._module
        self._module.__file__ = str(self._file)
        statements = ast.parse(self._file.read_text(encoding="utf-8")).body
        self._homes = {name: node for node in statements for name in _defined(node)}

    def get(self, name: str) -> Any:
        """Return what a name is, defining it first if need be; None for one not of the module."""
        members = vars(self._module)
        if name not in members and name in self._homes:
            self._define(self._homes[name], name)
        return members.get(name)

    def _define(self, node: ast.stmt, name: str) -> None:
        if isinstance(node, ast.ImportFrom) and _is_own(node.module):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            vars(self._module)[name] = _Excerpt(str(node.module)).get(original)
            return
        kept = _without_bodies(node)
        for each in _named(kept):
            self.get(each)
        # Not inherited: annotations are evaluated at once, so that nobody has to find them later.
        code = compile(
            ast.Module([kept], type_ignores=[]), str(self._file), "exec", dont_inherit=True
        )
        exec(code, vars(self._module))


def _source_file(module: str) -> Path:
    """Find a module's file; its packages may import much, so only the outermost is looked up."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no source of {module}")
    place = Path(spec.origin).parent.joinpath(*parts)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _named(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a definition needs, and whom a function hands its ``**options`` to."""
    kwarg = node.args.kwarg.arg if isinstance(node, ast.FunctionDef) and node.args.kwarg else None
    for call in ast.walk(node) if kwarg else ():
        if isinstance(call, ast.Call) and any(
            word.arg is None and isinstance(word.value, ast.Name) and word.value.id == kwarg
            for word in call.keywords
        ):
            yield from (each.id for each in ast.walk(call.func) if isinstance(each, ast.Name))
    head = node.args if isinstance(node, ast.FunctionDef) else node
    for each in ast.walk(head):
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load):
            yield each.id


def _without_bodies(node: ast.stmt) -> ast.stmt:
    """Keep of a function its arguments and docstring, of a class its fields and docstring.

    Of a function that takes ``**options`` the body is kept: the parser looks there for whom they
    are handed to. A class that is no dataclass, a model say, is no option; of it only a name is
    needed, and neither its bases nor its fields.
    """
    if isinstance(node, ast.FunctionDef):
        node.decorator_list, node.returns = [], None
        if node.args.kwarg is None:
            node.body = [*_docstring(node), ast.copy_location(ast.Pass(), node)]
    elif isinstance(node, ast.ClassDef):
        fields = [each for each in node.body if isinstance(each, ast.Assign | ast.AnnAssign)]
        if not node.decorator_list:
            node.bases, node.keywords, fields = [], [], []
        node.body = [*_docstring(node), *fields] or [ast.copy_location(ast.Pass(), node)]
    return node


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> list[ast.stmt]:
    return node.body[:1] if ast.get_docstring(node) is not None else []


def _is_own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _OWN
