"""Rules that say which layers of the zoo the blocks of a model have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moezoo.errors import InputError, nearest
from moezoo.feed_forward import FeedForward, registered, select_layers, zoo
from moezoo.router_input import FFN_INPUT, check_router_input


def check_ffn_rules(rules: Any, num_layers: int, d_model: int) -> list[dict[str, Any]]:
    """Check the shape of the rules that choose feed-forward blocks, and copy them.

    Only layers that are registered in the zoo can be named, so that a checkpoint's configuration
    never makes us import code. Their arguments are checked when they are built.

    Args:
        rules: a list of mappings with ``layers``, ``class_path``, ``init_args`` and, if it is not
            the default, ``router_input``.
        num_layers: number of layers of the model.
        d_model: width of the model.

    Returns:
        The rules, each with the first three keys and no ``d_model`` in its ``init_args``; with
        ``router_input`` only where it is not the default.

    Raises:
        InputError: names the rule, the key and the fix.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise InputError(
            f"ffn: {rules!r} is not a list of rules with layers and class_path; write one, e.g. "
            '[{"layers": "all", "class_path": "moezoo.DenseFFN"}]'
        )
    checked = []
    covered: set[int] = set()
    for number, rule in enumerate(rules):
        try:
            checked.append(_checked_rule(rule, d_model))
            covered.update(select_layers(checked[-1]["layers"], num_layers))
        except InputError as error:
            raise InputError(f"ffn[{number}]: {error}") from None
    if missing := sorted(set(range(num_layers)) - covered):
        raise InputError(f"ffn: no rule for layer {missing[0]}; begin with one for layers: all")
    return checked


def check_memory_rules(rules: Any, num_layers: int, d_model: int) -> list[dict[str, Any]]:
    """Check the shape of the rules that add layers to blocks, and copy them.

    Args:
        rules: a list of mappings with ``layers``, ``class_path`` and ``init_args``.
        num_layers: number of layers of the model.
        d_model: width of the model.

    Returns:
        The rules, each with these keys and no ``d_model`` in its ``init_args``.

    Raises:
        InputError: names the rule, the key and the fix.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise InputError(
            f"memory: {rules!r} is not a list of rules with layers and class_path; write one, e.g. "
            '[{"layers": [1], "class_path": "moezoo.Engram"}]'
        )
    checked = []
    for number, rule in enumerate(rules):
        try:
            if isinstance(rule, Mapping) and "router_input" in rule:
                raise InputError("router_input: a memory has no router; leave it out")
            checked.append(_checked_rule(rule, d_model))
            select_layers(checked[-1]["layers"], num_layers)
            _check_added(registered(rule["class_path"]))
        except InputError as error:
            raise InputError(f"memory[{number}]: {error}") from None
    return checked


def _check_added(layer: type[FeedForward]) -> None:
    if layer.added is None:
        able = sorted({m.layer.__name__ for m in zoo() if m.layer.added is not None})
        raise InputError(
            f"class_path: {layer.__name__} takes the place of a feed-forward block; name it in "
            f"ffn, or choose from: {', '.join(f'moezoo.{name}' for name in able)}"
        )


def _checked_rule(rule: Any, d_model: int) -> dict[str, Any]:
    keys = ("layers", "class_path", "init_args", "router_input")
    if not isinstance(rule, Mapping):
        raise InputError(f"{rule!r} is not a rule; write a mapping with layers and class_path")
    for key in rule:
        if key not in keys:
            raise InputError(f"unknown key '{key}'{nearest(str(key), keys)}")
    for key in ("layers", "class_path"):
        if key not in rule:
            raise InputError(f"{key} is missing; add it")
    read = check_router_input(rule.get("router_input", FFN_INPUT), registered(rule["class_path"]))
    arguments = rule.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"init_args: {arguments!r} is not a mapping; write names and values")
    if arguments.get("d_model", d_model) != d_model:
        raise InputError(
            f"init_args: d_model {arguments['d_model']} is not the model's hidden_size {d_model}; "
            "leave it out"
        )
    arguments = {key: value for key, value in arguments.items() if key != "d_model"}
    known = {"layers": rule["layers"], "class_path": rule["class_path"], "init_args": arguments}
    return known if read == FFN_INPUT else {**known, "router_input": read}
