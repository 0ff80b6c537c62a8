"""Names of the zoo's methods in the place of a layer: ``ffn: switch`` in YAML, or as an option.

A name stands for the layer's class with all its arguments: the method's own, and the defaults of
the rest, so that nothing of what it replaces is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from moezoo.command.settings import load_yaml
from moezoo.errors import InputError, nearest

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def with_methods(value: Any) -> Any:
    """Write out the layers of settings that are named by a method of the zoo.

    ``ffn: NAME``, or ``class_path: NAME`` in the place of a layer, becomes class and arguments;
    where its mapping says nothing of ``router_input``, that is the method's.

    Args:
        value: what a YAML text holds; names that are unknown stay as they are.
    """
    if isinstance(value, list):
        return [with_methods(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_methods(inner) for key, inner in value.items()}
    if (name := _named(value.get("ffn"))) is not None and (method := _methods().get(name)):
        given = value["ffn"] if isinstance(value["ffn"], dict) else {}
        found["ffn"] = {**given, **layer_of(name, given.get("init_args") or {})}
        found.setdefault("router_input", method.router_input)
    return found


def with_method_words(words: Sequence[str], key: str) -> list[str]:
    """Write out an option of a command line that names a method, as :func:`with_methods` does.

    Args:
        words: the command line, in which an option stands before those that are part of it.
        key: dotted name of the option, ``model.ffn``; beside it is ``router_input``.

    Raises:
        InputError: the value is neither a method nor a class; the nearest of all is proposed.
    """
    beside = f"{key.rpartition('.')[0]}.router_input"
    own = any(word.partition("=")[0] == f"--{beside}" for word in words)
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        with_value = equals or (rest and not rest[0].startswith("--"))
        if option not in (f"--{key}", f"--{key}.class_path") or not with_value:
            found.append(word)
            continue
        value = value if equals else rest.pop(0)
        given = _mapping(value)
        if name := _named(given or value):
            check_name(key, name)
        if method := _methods().get(name) if name else None:
            written = layer_of(method.name, (given or {}).get("init_args") or {})
            found.append(f"--{key}={json.dumps({**(given or {}), **written})}")
            if not own:
                found.append(f"--{beside}={method.router_input}")
        else:
            found.append(f"--{key}={value}")
    return found


def layer_of(name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return class and arguments of a method, JSON-able, without the width.

    Args:
        name: of a method of the zoo.
        given: arguments that replace the method's, option by option.
    """
    from moezoo.arguments import plain, signature  # not above: it imports torch

    method = _methods()[name]
    defaults = {n: parameter.default for n, parameter in signature(method.layer).items()}
    arguments = {n: plain(v) for n, v in {**defaults, **method.arguments}.items() if n != "d_model"}
    return {
        "class_path": f"moezoo.{method.layer.__name__}",
        "init_args": _merged(arguments, given or {}),
    }


def check_names(settings: Any, path: str = "") -> None:
    """Check that what ``ffn`` names in settings, if it is a bare word, is known.

    Raises:
        InputError: names the key, and the nearest method or class.
    """
    for key, value in _items(settings, path):
        if key.rpartition(".")[2] == "ffn" and (name := _named(value)) is not None:
            check_name(key, name)
        check_names(value, key)


def check_name(key: str, name: str) -> None:
    """Check that a bare word names a method of the zoo, or the class of one.

    Raises:
        InputError: it does not; the nearest is proposed.
    """
    methods = _methods()
    classes = {method.layer.__name__ for method in methods.values()}
    if name in methods or name in classes:
        return
    if name[0].isupper():
        raise InputError(f"{key}: '{name}' is not a known class{nearest(name, classes)}")
    raise InputError(f"{key}: the zoo has no method '{name}'{nearest(name, methods)}")


def _items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{path}.{key}" if path else str(key), each) for key, each in value.items())
    elif isinstance(value, list):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(value))


def _mapping(text: str) -> dict[str, Any] | None:
    """Return the mapping that a value of the command line is; None if it is something else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = load_yaml(text)
    except yaml.YAMLError:
        return None  # which the parser says
    return found if isinstance(found, dict) else None


def _named(value: Any) -> str | None:
    """Return the bare word that stands in the place of a layer; None if none does."""
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def _methods() -> dict[str, Any]:
    from moezoo.feed_forward import zoo  # not above: it imports torch

    return {method.name: method for method in zoo()}


def _merged(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace options, of nested mappings those that are given only."""
    both = dict(options)
    for name, value in given.items():
        old = both.get(name)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        both[name] = _merged(old, value) if nested else value  # type: ignore[arg-type]
    return both
