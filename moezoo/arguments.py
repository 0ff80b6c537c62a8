"""Arguments in configurations: calling classes with them, and back; rules that name layers."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moezoo.errors import InputError, nearest

T = TypeVar("T")


def build(cls: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Call ``cls`` with ``arguments``, naming a misspelt one; mappings become options classes.

    Raises:
        InputError: an argument is unknown, missing, or refused by the constructor.
    """
    parameters = signature(cls)
    name = getattr(cls, "__name__", str(cls))
    for key in arguments:
        if key not in parameters:
            raise InputError(f"{name}: unknown argument '{key}'{nearest(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise InputError(f"{name}: argument '{key}' is missing; give it")
    built = {key: as_argument(cls, key, value) for key, value in arguments.items()}
    return cls(**built)


def signature(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor or function by name, without ``self``."""
    parameters = dict(inspect.signature(cls).parameters)
    parameters.pop("self", None)
    return parameters


def as_argument(cls: Callable[..., Any], key: str, value: Any) -> Any:
    """Turn a mapping into the options dataclass that ``cls`` annotates for ``key``, if any."""
    constructor = cls.__init__ if inspect.isclass(cls) else cls
    hint = typing.get_type_hints(constructor).get(key)
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    members = typing.get_args(hint) if union else (hint,)
    options = [m for m in members if dataclasses.is_dataclass(m) and isinstance(m, type)]
    if options and isinstance(value, Mapping):
        return build(options[0], value)
    only = options and set(members) <= {*options, type(None)}
    if only and not isinstance(value, tuple(members)):
        raise InputError(f"{key}: {value!r} is not a mapping of options; write name: value")
    return value


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
    if not isinstance(layers, int | list | tuple):
        raise InputError(f"layers: {layers!r} is not understood; write all, every 2, or [3, 7]")
    indices = [layers] if isinstance(layers, int) else list(layers)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"layers: {index!r} is not a layer number; write e.g. [3, 7]")
        if not -num_layers <= index < num_layers:
            raise InputError(f"layers: there is no layer {index}; the model has {num_layers}")
    return sorted({index % num_layers for index in indices})
