"""The modules of this project as statements, each with the global names that it refers to.

Positions count bytes of a module's UTF-8, as those of :mod:`ast` do.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from moezoo.errors import InputError

PACKAGES = ("moezoo", "moezoo_kernels", "moezoo_models")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Reference:
    """A global name in a statement, or a member of one: ``name`` or ``name.member``.

    Attributes:
        name: as the statement calls it.
        start: where it begins.
        end: where the name ends.
        member: the attribute that is read of it; None where it stands alone.
        whole_end: where the attribute ends.
        hidden: names of variables of the functions around it.
        eager: read when the module is loaded, and not when a function is called.
    """

    name: str
    start: int
    end: int
    member: str | None = None
    whole_end: int = 0
    hidden: frozenset[str] = frozenset()
    eager: bool = False


@dataclass
class Part:
    """A method of a class, or what is left of a statement without its methods.

    Attributes:
        name: of the method; None for the rest.
        start: where it begins, with decorators and the comments above.
        end: where its last line ends.
        references: global names.
        attributes: names that are read of objects.
        imports: positions of the imports from this project in functions.
    """

    name: str | None
    start: int
    end: int
    references: list[Reference] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)
    imports: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Statement:
    """A statement of a module, outside of any function.

    Attributes:
        module: its module.
        names: the global names that it gives a value.
        parts: the rest comes first, then methods.
        follows: the global name whose statement it belongs to; None if it is one of its own.
    """

    module: str
    names: tuple[str, ...]
    parts: list[Part]
    follows: str | None = None


@dataclass
class Module:
    """A module as it is written.

    Attributes:
        name: with its packages.
        path: from the folder of its outermost package.
        source: its bytes.
        docstring: of the module.
        statements: in their order, without imports.
        imports: what a name that is imported stands for: a module, and a name in it or None.
        late: names that functions import.
        types: names that annotations alone read.
    """

    name: str
    path: str
    source: bytes
    docstring: str
    statements: list[Statement]
    imports: dict[str, tuple[str, str | None]]
    late: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)


@cache
def read_module(name: str) -> Module:
    """Read a module of this project.

    Raises:
        InputError: it was installed without its source.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise InputError(f"with_code: {name} is installed without its source; install moezoo anew")
    file = Path(spec.origin)
    levels = name.count(".") + (2 if file.name == "__init__.py" else 1)
    source = file.read_bytes()
    tree = ast.parse(source)
    lines = _Lines(source)
    module = Module(
        name, "/".join(file.parts[-levels:]), source, ast.get_docstring(tree) or "", [], {}
    )
    previous: tuple[str, ...] = ()
    for before, node in pairwise([None, *tree.body]):
        assert node is not None
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports |= _imported(node)
        elif _is_type_checking(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    found = _imported(inner)
                    if file.name == "__init__.py":  # where names are loaded when asked for
                        module.imports |= found
                    else:
                        module.types |= found.keys()
        elif (statement := _statement(module, node, lines)) is not None:
            if not statement.names and _is_text(node):
                if before is None or not previous:
                    continue
                statement.follows = previous[0]
            module.statements.append(statement)
            previous = statement.names
    return module


def is_module(name: str) -> bool:
    """Return whether this project has a module of that name."""
    if name.partition(".")[0] not in PACKAGES:
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class _Lines:
    """Where lines begin and end."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def begin(self, node: ast.stmt) -> int:
        """Return where a statement begins, with its decorators and the comments above."""
        decorators = getattr(node, "decorator_list", [])
        line = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        while line > 1 and self.lines[line - 2].lstrip().startswith(b"#"):
            line -= 1
        return self.starts[line - 1]

    def end(self, node: ast.stmt) -> int:
        return self.starts[node.end_lineno or node.lineno]

    def span(self, node: ast.expr) -> tuple[int, int]:
        end_line, end_column = node.end_lineno or 0, node.end_col_offset or 0
        return self.at(node.lineno, node.col_offset), self.at(end_line, end_column)

    def defined(self, node: _Function | ast.ClassDef) -> Reference:
        """Return where the name of a function or class is."""
        start = self.at(node.lineno, node.col_offset)
        match = re.compile(rb"(?:async\s+)?(?:def|class)\s+").match(self.source, start)
        assert match is not None
        return Reference(node.name, match.end(), match.end() + len(node.name.encode()))


def _statement(module: Module, node: ast.stmt, lines: _Lines) -> Statement | None:
    """Return a statement with its references; None for kinds that are never copied."""
    if isinstance(node, _Function | ast.ClassDef):
        names: tuple[str, ...] = (node.name,)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found = [each for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)]
        names = tuple(each.id for each in found if isinstance(each.ctx, ast.Store))
    elif isinstance(node, ast.Expr):
        names = ()
    else:
        return None
    if "__all__" in names:
        return None
    rest = Part(None, lines.begin(node), lines.end(node))
    parts = [rest]
    finder = _Finder(lines, rest, module)
    if isinstance(node, ast.ClassDef):
        rest.references.append(lines.defined(node))
        own = frozenset(_stored(node.body))
        finder.visit_all([*node.bases, *(k.value for k in node.keywords), *node.decorator_list])
        for inner in node.body:
            if not isinstance(inner, _Function):
                finder.scopes = [own]
                finder.visit(inner)
                continue
            part = Part(inner.name, lines.begin(inner), lines.end(inner))
            _Finder(lines, part, module).method(inner, own)
            parts.append(part)
    else:
        if isinstance(node, _Function):
            rest.references.append(lines.defined(node))
        finder.visit(node)
    follows = None
    if not names or names == ("_",):
        names = ()
        outermost = sorted(rest.references, key=lambda reference: reference.start)
        follows = next((r.name for r in outermost if r.name != "_"), None)
    return Statement(module.name, names, parts, follows)


class _Finder(ast.NodeVisitor):
    """Collects what a part refers to outside of its own functions."""

    def __init__(self, lines: _Lines, part: Part, module: Module) -> None:
        self.lines, self.part, self.module = lines, part, module
        self.inside = 0  # of how many functions, or of an annotation
        self.scopes: list[frozenset[str]] = []

    def visit_all(self, nodes: list[ast.expr]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._found(node, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.part.attributes.add(node.attr)
        if isinstance(node.value, ast.Name):
            self._found(node.value, node)
        else:
            self.visit(node.value)

    def _found(self, name: ast.Name, whole: ast.Attribute | None) -> None:
        if any(name.id in scope for scope in self.scopes):
            return
        start, end = self.lines.span(name)
        hidden: frozenset[str] = frozenset().union(*self.scopes)
        member, whole_end = (
            (None, end) if whole is None else (whole.attr, self.lines.span(whole)[1])
        )
        eager = not self.inside
        self.part.references.append(
            Reference(name.id, start, end, member, whole_end, hidden, eager)
        )

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            constant = node.args[1]
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                self.part.attributes.add(constant.value)
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] not in PACKAGES:
            return
        for alias, target in _imported(node).items():
            if self.module.imports.setdefault(alias, target) != target:
                raise AssertionError(f"{alias} is imported from two places in {self.module.name}")
            self.module.late.add(alias)
        self.part.imports.append((self.lines.begin(node), self.lines.end(node)))

    def method(self, node: _Function, own: frozenset[str]) -> None:
        """Visit a method: names of its class are seen by its header, and not by its body."""
        self.scopes = [own]
        self._header(node)
        self.scopes = []
        self._body(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._header(node)
        self._body(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._header(node)
        self._body(node)

    def _header(self, node: _Function) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        values = [*node.decorator_list, *arguments.defaults]
        values += [value for value in arguments.kw_defaults if value is not None]
        self.visit_all(values)
        types = [each.annotation for each in every] + [node.returns]
        self.inside += 1
        self.visit_all([each for each in types if each is not None])
        self.inside -= 1

    def _body(self, node: _Function) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        self.scopes.append(frozenset({each.arg for each in every} | set(_stored(node.body))))
        self.inside += 1
        for inner in node.body:
            self.visit(inner)
        self.inside -= 1
        self.scopes.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_all(node.args.defaults)
        self.scopes.append(frozenset(each.arg for each in node.args.args))
        self.visit(node.body)
        self.scopes.pop()

    def _comprehension(self, node: ast.expr) -> None:
        targets = [g.target for g in node.generators]  # type: ignore[attr-defined]
        names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        self.scopes.append(frozenset(names))
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _stored(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements give a value in their own scope."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Function | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            home = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if home.partition(".")[0] not in PACKAGES:
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            inner = (each for each in ast.walk(node) if isinstance(each, ast.NamedExpr))
            yield from (each.target.id for each in inner)
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name: (node.module or "", a.name) for a in node.names}
    return {
        alias.asname or alias.name.partition(".")[0]: (
            alias.name if alias.asname else alias.name.partition(".")[0],
            None,
        )
        for alias in node.names
    }


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
