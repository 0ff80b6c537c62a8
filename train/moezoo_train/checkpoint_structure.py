"""Structure of a training checkpoint, and kinds of its values, checked before anything reads it.

A checkpoint of wrong structure would raise any error anywhere in Lightning. This module imports no
other of the package: files of one process and of many are checked alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from moezoo.command.messages import shorten
from moezoo.errors import InputError

CONFIG_KEY = "moezoo"
"""Field of a training checkpoint that describes the model and the run it is of."""
VERSION = "pytorch-lightning_version"
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_structure(checkpoint: Any) -> None:
    """Check that a checkpoint has the parts that its readers go through.

    Raises:
        ValueError: names the part that is something else.
    """
    _expect("it", checkpoint, dict, "a mapping")
    state = _expect("state_dict", checkpoint.get("state_dict"), Mapping, "a mapping")
    for name, value in state.items():
        _expect("state_dict", name, str, "made of names")
        _expect(name, value, Tensor, "a tensor")
    version = _expect(VERSION, checkpoint.get(VERSION), str, "a version")
    try:
        Version(version)
    except InvalidVersion:
        raise ValueError(f"{VERSION} is {shorten(version)}, not a version") from None
    for name in ("epoch", "global_step"):
        check_kind(name, checkpoint.get(name, 0), 0)
    for name, callback in _mapping(checkpoint, "callbacks").items():
        _expect(f"callbacks.{name}", callback, dict, "a mapping")
    for name, loop in _mapping(checkpoint, "loops").items():
        _expect(f"loops.{name}", loop, dict, "a mapping")
    for number, schedule in enumerate(_list(checkpoint, "lr_schedulers")):
        _expect(f"lr_schedulers[{number}]", schedule, dict, "a mapping")
    for number, optimizer in enumerate(_list(checkpoint, "optimizer_states")):
        place = f"optimizer_states[{number}]"
        _expect(place, optimizer, dict, "a mapping")
        states = _expect(f"{place}.state", optimizer.get("state"), dict, "a mapping")
        for parameter, values in states.items():
            _expect(f"{place}.state.{parameter}", values, dict, "a mapping")
        for group in _list(optimizer, "param_groups", place):
            _expect(f"{place}.param_groups", group, dict, "a list of mappings")
    if CONFIG_KEY in checkpoint:
        _check_description(_mapping(checkpoint, CONFIG_KEY))


def _check_description(known: dict[str, Any]) -> None:
    """Check the parts that :meth:`LanguageModel.on_save_checkpoint` writes."""
    _expect(f"{CONFIG_KEY}.config", known.get("config"), dict, "a mapping")
    for name in ("unrelated", "optimizer", "guard", "lora", "neurons", "sparse_memory"):
        _expect(f"{CONFIG_KEY}.{name}", known.get(name, {}), dict, "a mapping")
    guard = known.get("guard", {})
    for name in ("skipped", "in_a_row"):
        check_kind(f"{CONFIG_KEY}.guard.{name}", guard.get(name, 0), 0)
    check_kind(f"{CONFIG_KEY}.guard.recent", guard.get("recent", ([], [])), ([0.0], [0.0]))


def check_kind(place: str, value: Any, like: Any, whole: bool = False) -> None:
    """Check that a value is of the kind of another, unless that is None.

    A missing key is left to its reader, which may know earlier versions; with ``whole`` it is an
    error.

    Raises:
        ValueError: names the place, and what is wrong there.
    """
    if like is None:
        return
    if isinstance(like, Mapping):
        _expect(place, value, Mapping, "a mapping")
        for key, inner in like.items():
            if key in value:
                check_kind(f"{place}.{key}", value[key], inner, whole)
            elif whole:
                raise ValueError(f"{place}.{key} is missing")
    elif isinstance(like, list | tuple):
        _expect(place, value, list | tuple, "a list")
        mixed = isinstance(like, tuple) or len({type(inner) for inner in like}) > 1
        if mixed and len(value) != len(like):
            raise ValueError(f"{place} has {len(value)} members, not {len(like)}")
        for number, inner in enumerate(value if like else ()):
            own = like[number if mixed else 0]
            check_kind(f"{place}[{number}]", inner, own, whole)
    elif isinstance(like, Tensor):
        _expect(place, value, Tensor, "a tensor")
        if value.dtype != like.dtype or value.shape != like.shape:
            raise ValueError(f"{place} is not a tensor {tuple(like.shape)} of {like.dtype}")
    elif isinstance(like, bool | str):
        _expect(place, value, type(like), _NAMES[type(like)])
    elif isinstance(like, int):
        if not is_whole(value):
            raise ValueError(f"{place} is not a whole number ≥ 0")
    elif isinstance(like, float):
        number = isinstance(value, float) or is_whole(value)
        if not number or math.isnan(value):
            raise ValueError(f"{place} is not a number")


def is_whole(value: Any) -> bool:
    """Return whether a value is an int64 of at least zero."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _expect(place: str, value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{place} is {'missing' if value is None else f'not {name}'}")
    return value


def _mapping(owner: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = _expect(name, owner.get(name, {}), dict, "a mapping")
    return found


def _list(owner: Mapping[str, Any], name: str, place: str = "") -> Iterable[Any]:
    where = f"{place}.{name}" if place else name
    found: list[Any] = _expect(where, owner.get(name, []), list, "a list")
    return found


def check_same(what: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare two nested descriptions.

    Raises:
        InputError: names the first field that differs, and both values.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(current))
    for key in old | new:
        if old.get(key) != new.get(key):
            raise InputError(
                f"ckpt_path: {what}.{key} is {old.get(key)} in the checkpoint, but {new.get(key)} "
                "in this run; use the same, or begin from its weights with model.initialize_from"
            )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every innermost value with its path, as in ``ffn[0].init_args.top_k``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value
