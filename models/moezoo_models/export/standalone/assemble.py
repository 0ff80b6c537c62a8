"""One file of plain torch from what a model's code refers to, copied from this project's modules.

Beginning at the model and its layers, every definition is followed to those it names; methods are
copied where something that is copied calls a method of that name, or a library may. What a plain
file cannot have, such as kernels, is replaced by :mod:`moezoo_models.export.standalone.plain`.
Names that two modules give to different things get the module's name behind them.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from moezoo_models.export.standalone.sources import (
    PACKAGES,
    Module,
    Part,
    Reference,
    Statement,
    is_module,
    read_module,
)

Target = tuple[str, str]
"""A module and a global name in it."""

PLAIN = "moezoo_models.export.standalone.plain"
LAYERS = "LAYERS"

_MODEL = "moezoo_models.model"
_SUBSTITUTES: dict[Target, Target] = {
    ("moezoo.feed_forward", "registered"): (PLAIN, "registered"),
    ("moezoo_models.files.loading", "GatedLoading"): (PLAIN, "GatedLoading"),
    (f"{_MODEL}.initialization", "current_deferred_init"): (PLAIN, "no_deferred_init"),
    (f"{_MODEL}.mixture_attention", "MixtureAttention"): (PLAIN, "MixtureAttention"),
    (f"{_MODEL}.joint_attention", "_fused"): (PLAIN, "joint_attention_cpu"),
    ("moezoo.routing.stats", "used_weight"): ("moezoo.routing.stats", "slot_weight"),
    (f"{_MODEL}.block", "fetching_ahead"): (PLAIN, "blocks_in_turn"),
    ("moezoo.experts.fetched_rows", "RowFetches"): (PLAIN, "RowFetches"),
    ("moezoo.experts.fetched_rows", "distinct_rows"): (PLAIN, "dispatch_tokens"),
    ("moezoo.experts.row_shares", "exchanged_rows"): (PLAIN, "dispatch_tokens"),
    ("moezoo.experts.row_shares", "load_share"): (PLAIN, "dispatch_tokens"),
    ("moezoo.experts.row_shares", "share_of"): (PLAIN, "dispatch_tokens"),
    ("moezoo.matrices.blocks", "by_blocks"): ("moezoo.matrices.blocks", "in_batches"),
    ("moezoo.matrices.packing", "Packing"): (PLAIN, "Packing"),
    ("moezoo.matrices.shuffles", "product"): ("moezoo.matrices.shuffles", "plain"),
    ("moezoo.matrices.shuffles", "unit"): ("moezoo.matrices.shuffles", "plain_unit"),
    ("moezoo.parallel", "own"): (PLAIN, "whole"),
    ("moezoo.parallel", "whole"): (PLAIN, "whole"),
    ("moezoo.parallel", "dispatch_tokens"): (PLAIN, "dispatch_tokens"),
    ("moezoo.parallel", "TokenGather"): (PLAIN, "dispatch_tokens"),
    ("moezoo_kernels.gated_unit", "gated_unit"): ("moezoo_kernels.activations", "gated_unit"),
    ("moezoo_kernels.grouped_linear", "assign"): (PLAIN, "assign"),
    ("moezoo_kernels.grouped_linear", "grouped_linear"): (PLAIN, "grouped_linear"),
    ("moezoo_kernels.grouped_linear", "grouped_linear_sum"): (PLAIN, "grouped_linear_sum"),
    ("moezoo_kernels.grouped_linear", "sum_by_token"): (PLAIN, "sum_by_token"),
    ("moezoo_kernels.grouped_mlp", "grouped_mlp"): (
        "moezoo_kernels.grouped_mlp.reference",
        "grouped_mlp",
    ),
    ("moezoo_kernels.grouped_mlp.direct", "grouped_mlp_directly"): (
        "moezoo_kernels.grouped_mlp.reference",
        "grouped_mlp",
    ),
    ("moezoo_kernels.grouped_mlp.direct", "may_run_directly"): (PLAIN, "is_direct"),
    ("moezoo_kernels.linear", "Linear"): (PLAIN, "Linear"),
    ("moezoo_kernels.linear", "is_plain_linear"): (PLAIN, "is_plain_linear"),
    ("moezoo_kernels.linear", "linear"): (PLAIN, "linear"),
    ("moezoo_kernels.linear", "multiply"): (PLAIN, "multiply"),
    ("moezoo_kernels.linear_cross_entropy", "linear_cross_entropy"): (
        PLAIN,
        "linear_cross_entropy",
    ),
    ("moezoo_kernels.ngram_rows", "ngram_rows"): ("moezoo_kernels.ngram_rows.plain", "ngram_rows"),
    ("moezoo_kernels.ngram_rows.plain", "remainders"): (
        "moezoo_kernels.ngram_rows.plain",
        "plain_remainders",
    ),
    ("moezoo_kernels.product_key_top_k", "product_key_top_k"): (
        "moezoo_kernels.product_key_top_k.staircase",
        "product_key_top_k",
    ),
    ("moezoo_kernels.rank_one_experts", "rank_one_experts"): (PLAIN, "rank_one_experts"),
    ("moezoo_kernels.selective_mlp", "selective_mlp"): (PLAIN, "selective_mlp"),
    ("moezoo_kernels.selective_mlp.cpu", "is_direct"): (PLAIN, "is_direct"),
    ("moezoo_kernels.sparse_linear", "sparse_linear"): (PLAIN, "sparse_linear"),
    ("moezoo_kernels.statistical_top_k", "statistical_top_k"): (
        "moezoo_kernels.statistical_top_k.plain",
        "statistical_top_k",
    ),
    ("moezoo_kernels.tree_descent", "leaf_mlp"): (PLAIN, "leaf_mlp"),
    ("moezoo_kernels.tree_descent", "path_neurons"): (PLAIN, "path_neurons"),
    ("moezoo_kernels.tree_descent", "tree_descent"): (
        "moezoo_kernels.tree_descent.reference",
        "tree_descent",
    ),
    ("moezoo_kernels.weighted_bag", "weighted_bag"): (PLAIN, "weighted_bag"),
}
"""What stands in the file for what cannot."""

_FOREIGN = (nn.Module, PreTrainedModel, PreTrainedConfig, GenerationMixin, ModelOutput)
_CALLED_BY_LIBRARIES = {name for base in _FOREIGN for name in dir(base)} | set(
    dir(torch.autograd.Function)
)


def assemble(roots: Iterable[Target], layers: Iterable[Target]) -> str:
    """Return the file's text, without a header.

    Args:
        roots: what it has to define.
        layers: classes that configurations may name; their names are kept.
    """
    layers = list(layers)
    selection = _Selection([*roots, *layers, (PLAIN, LAYERS)])
    names = _names(selection, layers)
    order = _order(selection)
    written = [_write(name, selection, names) for name in order]
    known = ", ".join(f"{name}={names[module, name]}" for module, name in layers)
    text = "\n\n\n".join([*written, f"{names[PLAIN, LAYERS]}.update({known})\n"])
    return f"{_imports(selection)}\n\n{text}"


class _Selection:
    """What is copied: statements by what they define, and parts of them."""

    def __init__(self, roots: Iterable[Target]) -> None:
        self.targets: set[Target] = set()
        self.parts: set[int] = set()
        self.outside: dict[str, tuple[str, str | None]] = {}
        self.attributes: set[str] = set()
        self._statements: list[Statement] = []
        for root in roots:
            self._reach(root)
        self._close()

    def modules(self) -> list[str]:
        """List the modules of which something is copied."""
        return list(dict.fromkeys(statement.module for statement in self._statements))

    def of_module(self, name: str) -> Iterator[Statement]:
        """Yield what is copied of a module, in its order."""
        chosen = {id(statement) for statement in self._statements}
        yield from (s for s in read_module(name).statements if id(s) in chosen)

    def has(self, part: Part) -> bool:
        """Return whether a part is copied."""
        return id(part) in self.parts

    def _reach(self, target: Target) -> None:
        if target in self.targets:
            return
        module, name = target
        # Several, where a function is overloaded, or a variable gets a value twice.
        statements = [s for s in read_module(module).statements if name in s.names]
        self.targets |= {(module, each) for s in statements for each in s.names}
        for statement in statements:
            self._add(statement)

    def _add(self, statement: Statement) -> None:
        self._statements.append(statement)
        self._take(statement, statement.parts[0])

    def _take(self, statement: Statement, part: Part) -> None:
        self.parts.add(id(part))
        self.attributes |= part.attributes
        for reference in part.references:
            found = resolve(read_module(statement.module), reference)
            if isinstance(found, tuple):
                self._reach(found)
            elif found is not None and (
                self.outside.setdefault(reference.name, found.imported) != found.imported
            ):
                raise AssertionError(f"{reference.name} is imported from two places")

    def _close(self) -> None:
        """Take methods that are called, and statements that belong to others, until all are."""
        before = -1
        while before != len(self.parts):
            before = len(self.parts)
            for statement in list(self._statements):
                for part in statement.parts[1:]:
                    if part.name is not None and not self.has(part) and self._called(part.name):
                        self._take(statement, part)
            for name in self.modules():
                for statement in read_module(name).statements:
                    owner = (name, statement.follows or "")
                    alone = not statement.names and id(statement.parts[0]) not in self.parts
                    if alone and owner in self.targets:
                        self._add(statement)

    def _called(self, method: str) -> bool:
        special = method.startswith("__") and method.endswith("__")
        return special or method in self.attributes or method in _CALLED_BY_LIBRARIES


class _Outside:
    """A name that is imported from another library."""

    def __init__(self, imported: tuple[str, str | None]) -> None:
        self.imported = imported


def resolve(module: Module, reference: Reference) -> Target | _Outside | None:
    """Return what a reference stands for; None for Python's own names and those of types alone."""
    found = _look_up(module.name, reference.name)
    if isinstance(found, str):  # a module of ours, of which something is read
        assert reference.member is not None, f"{module.name} hands {found} on"
        found = _look_up(found, reference.member)
        assert isinstance(found, tuple), f"{reference.name}.{reference.member}"
    return found


def _look_up(module: str, name: str) -> Target | _Outside | str | None:
    if (module, name) in _SUBSTITUTES:
        return _SUBSTITUTES[module, name]
    read = read_module(module)
    if any(name in statement.names for statement in read.statements):
        return module, name
    if name not in read.imports:
        assert hasattr(builtins, name) or name in read.types, f"{module}.{name}"
        return None
    home, inner = read.imports[name]
    if home.partition(".")[0] not in PACKAGES:
        return _Outside((home, inner))
    if inner is None:
        return home
    known = (home, inner) in _SUBSTITUTES or _knows(read_module(home), inner)
    if not known and is_module(f"{home}.{inner}"):
        return f"{home}.{inner}"
    return _look_up(home, inner)


def _knows(module: Module, name: str) -> bool:
    defined = any(name in statement.names for statement in module.statements)
    # A package may import a module of its own by its name.
    imported = name in module.imports and module.imports[name] != (module.name, name)
    return defined or imported


def _names(selection: _Selection, layers: list[Target]) -> dict[Target, str]:
    """Return a name for each definition; one that is taken gets its module's behind it."""
    taken = {*selection.outside, *dir(builtins)}
    found: dict[Target, str] = {}
    order = [*layers, *sorted(selection.targets - set(layers), key=_rank)]
    for module, name in order:
        wanted = name
        for part in reversed(module.split(".")[1:]):
            if wanted not in taken:
                break
            wanted = f"{wanted}_{part}"
        assert wanted not in taken, f"{module}.{name}"
        taken.add(wanted)
        found[module, name] = wanted
    return found


def _rank(target: Target) -> tuple[int, Target]:
    """Put the names of models and layers first: those that have one twice are mostly helpers."""
    ranks = ("moezoo_models.model", "moezoo.layers", "moezoo.")
    found = (number for number, start in enumerate(ranks) if target[0].startswith(start))
    return next(found, len(ranks)), target


def _order(selection: _Selection) -> list[str]:
    """Put modules behind those that they import when they are loaded."""
    chosen, order, seen = set(selection.modules()), [], set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        module = read_module(name)
        for statement in selection.of_module(name):
            for part in statement.parts:
                for reference in part.references:
                    found = resolve(module, reference)
                    if not isinstance(found, tuple) or found[0] not in chosen:
                        continue
                    lazily = reference.name in module.late or found[0] == PLAIN
                    if reference.eager or not lazily:
                        visit(found[0])
        order.append(name)

    for name in sorted(chosen):
        visit(name)
    return order


def _write(name: str, selection: _Selection, names: dict[Target, str]) -> str:
    """Return the statements that are copied of a module, under a comment that says whence."""
    module = read_module(name)
    lines = [f"From {module.path}:", *module.docstring.splitlines()]
    text = "\n".join(f"# {line}".rstrip() for line in lines) + "\n"
    previous = None
    for statement in selection.of_module(name):
        gap = "\n"
        if previous is not None:
            between = module.source[previous.parts[0].end : statement.parts[0].start].decode()
            gap = "\n\n" if between.strip() else between
        text += gap + _copy(module, statement, selection, names)
        previous = statement
    return text.rstrip("\n")


def _copy(
    module: Module, statement: Statement, selection: _Selection, names: dict[Target, str]
) -> str:
    """Return a statement's text without methods that are not copied, and with final names."""
    edits: list[tuple[int, int, str]] = []
    rest = statement.parts[0]
    for part in statement.parts:
        if part is not rest and not selection.has(part):
            edits.append((_with_blank(module, part.start), part.end, ""))
            continue
        edits += [(start, _with_blank_behind(module, end), "") for start, end in part.imports]
        for reference in part.references:
            found = resolve(module, reference)
            if not isinstance(found, tuple):
                continue
            final = names[found]
            whole = reference.member is not None and _look_up(module.name, reference.name) != found
            end = reference.whole_end if whole else reference.end
            if final != module.source[reference.start : end].decode():
                assert final not in reference.hidden, f"{final} in {statement.names}"
                edits.append((reference.start, end, final))
    source, position, pieces = module.source, rest.start, []
    for start, end, text in sorted(set(edits)):
        pieces += [source[position:start].decode(), text]
        position = end
    pieces.append(source[position : rest.end].decode())
    return "".join(pieces)


def _with_blank(module: Module, start: int) -> int:
    """Return where the blank lines above a position begin."""
    return len(module.source[:start].rstrip(b" \n")) + 1


def _with_blank_behind(module: Module, end: int) -> int:
    """Return where the blank lines behind a position end."""
    return len(module.source) - len(module.source[end:].lstrip(b"\n"))


def _imports(selection: _Selection) -> str:
    """Return the imports from other libraries, Python's own first."""
    plain: list[str] = []
    members: dict[str, list[str]] = {}
    for alias, (home, name) in sorted(selection.outside.items()):
        if name is None:
            plain.append(f"import {home}" + (f" as {alias}" if alias != home else ""))
        else:
            members.setdefault(home, []).append(name if alias == name else f"{name} as {alias}")
    texts = [*plain]
    for home, each in members.items():
        line = f"from {home} import {', '.join(each)}"
        if len(line) > 100:
            line = f"from {home} import (\n" + "".join(f"    {n},\n" for n in each) + ")"
        texts.append(line)

    def rank(text: str) -> tuple[bool, bool, str]:
        home = text.split()[1].partition(".")[0]
        return home not in sys.stdlib_module_names, text.startswith("from"), text

    texts.sort(key=rank)
    own = [text for text in texts if not rank(text)[0]]
    others = [text for text in texts if rank(text)[0]]
    return "from __future__ import annotations\n\n" + "\n\n".join(
        "\n".join(group) for group in (own, others) if group
    )
