"""Arguments in configurations: calling classes with them, and back; rules that name layers."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moezoo.errors import InputError, nearest

T = TypeVar("T")


def build(cls: Callable[..., T], arguments: Mapping[str, Any], path: str = "") -> T:
    """Call ``cls`` with ``arguments``, naming a misspelt one; mappings become options classes.

    Args:
        cls: a class or function.
        arguments: its arguments by name.
        path: where a configuration has these arguments, ``router.logits`` for example; empty for
            those of a layer, whose messages begin with the name of ``cls``.

    Raises:
        InputError: an argument is unknown, missing, or refused by the constructor.
    """
    parameters = signature(cls)
    start = path or getattr(cls, "__name__", str(cls))
    what = "option" if path else "argument"
    for key in arguments:
        if key not in parameters:
            raise InputError(f"{start}: unknown {what} '{key}'{nearest(str(key), parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise InputError(f"{start}: {what} '{key}' is missing; give it")
    built = {key: as_argument(cls, key, value, path) for key, value in arguments.items()}
    return cls(**built)


def signature(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor or function by name, without ``self``."""
    parameters = dict(inspect.signature(cls).parameters)
    parameters.pop("self", None)
    return parameters


def as_argument(cls: Callable[..., Any], key: str, value: Any, path: str = "") -> Any:
    """Turn a mapping into the options dataclass that ``cls`` annotates for ``key``, if any.

    ``path`` as for :func:`build`.
    """
    constructor = cls.__init__ if inspect.isclass(cls) else cls
    hint = typing.get_type_hints(constructor).get(key)
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    members = typing.get_args(hint) if union else (hint,)
    options = [m for m in members if dataclasses.is_dataclass(m) and isinstance(m, type)]
    only = options and set(members) <= {*options, type(None)}
    if options and (only or isinstance(value, Mapping)) and not (union and value is None):
        if isinstance(value, tuple(options)):
            return value
        field = f"{path}.{key}" if path else key
        chosen = _of_kind(field, options, value) if isinstance(value, Mapping) else options[0]
        return as_options(field, value, chosen)
    return value


def as_options(field: str, value: Any, options: type[T]) -> T:
    """Return options that are given as they are, or as a mapping.

    Args:
        field: where a configuration has them.
        value: what was given.
        options: their class.

    Raises:
        InputError: it is neither; or a mapping names an option that there is not.
    """
    if isinstance(value, options):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"{field}: {value!r} is not a mapping of options; write name: value")
    return build(options, value, field)


def _of_kind(field: str, options: list[type], value: Mapping[str, Any]) -> type:
    """Choose among options classes the one whose field ``kind`` can be the mapping's.

    A class without such a field is chosen where it is the first; a mapping without ``kind`` is the
    first class's too.

    Raises:
        InputError: no class is of that kind; the nearest is proposed.
    """
    kinds = {
        kind: each
        for each in options
        for kind in typing.get_args(typing.get_type_hints(each).get("kind"))
    }
    if "kind" not in value or not kinds:
        return options[0]
    if value["kind"] not in kinds:
        raise InputError(
            f"{field}.kind: {value['kind']!r} is not known{nearest(str(value['kind']), kinds)}"
        )
    return kinds[value["kind"]]


def plain(value: Any) -> Any:
    """Return an argument as JSON and YAML have it: options as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def select_layers(layers: str | int | list[int], num_layers: int) -> list[int]:
    """Turn a rule into layer indices: ``"all"``, ``"every 2"``, ``3`` or ``[3, 7]``.

    ``"every n"`` takes layers n-1, 2n-1, …, so the first layers stay as they are. Negative
    numbers count from the end.

    Args:
        layers: the rule.
        num_layers: blocks of the model.

    Returns:
        Indices in ascending order, each once, from 0.

    Raises:
        InputError: the rule is not of that form, or names a layer that does not exist.
    """
    if layers == "all":
        return list(range(num_layers))
    if isinstance(layers, str):
        word, _, count = layers.partition(" ")
        digits = count.strip()
        if word == "every" and digits.isdecimal() and len(digits) < 10 and int(digits) > 0:
            return list(range(int(digits) - 1, num_layers, int(digits)))
        if re.fullmatch(r"-?\d{1,9}", layers):  # a command line's number
            layers = int(layers)
    if not isinstance(layers, int | list | tuple):
        raise InputError(f"layers: {layers!r} is not understood; write all, every 2, or [3, 7]")
    indices = [layers] if isinstance(layers, int) else list(layers)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"layers: {index!r} is not a layer number; write e.g. [3, 7]")
        if not -num_layers <= index < num_layers:
            raise InputError(f"layers: there is no layer {index}; the model has {num_layers}")
    return sorted({index % num_layers for index in indices})
