"""Reading settings in YAML, from whoever they come: bounded, and with every key once.

YAML may say a thing once and repeat it by aliases, so that a few lines stand for billions of
values; and of a key that is given twice PyYAML takes the last without a word.
"""

from __future__ import annotations

import difflib
import os
from typing import Any

import jsonargparse
import yaml

from moezoo.command.messages import one_line, shorten
from moezoo.errors import InputError

LARGEST = 1 << 18
"""Characters of a YAML text …"""
MOST_VALUES = 50_000
"""… values in it, with all that aliases repeat …"""
DEEPEST = 64
"""… and how deep they may be nested."""

_MERGE = "tag:yaml.org,2002:merge"
_load_unchecked = jsonargparse.get_loader("yaml")


class YAMLRefused(yaml.MarkedYAMLError):
    """YAML that is valid, but not to be read."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def load_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, if it may be read.

    Raises:
        yaml.YAMLError: it is not YAML, too large, too deep, or holds a key twice.
    """
    check_yaml(text)
    try:
        return _load_unchecked(text)
    # Integers of thousands of digits, and dates that there are not.
    except (ValueError, OverflowError, RecursionError) as error:
        raise YAMLRefused(one_line(str(error))) from error


def check_yaml(text: str) -> None:
    """Check that YAML may be read.

    Raises:
        yaml.YAMLError: it is not YAML, too large, too deep, or holds a key twice.
    """
    if len(text) > LARGEST:
        raise YAMLRefused(f"it has {len(text):,} characters, more than {LARGEST:,}")
    if not any(sign in text for sign in '[{:-"'):
        return  # a scalar
    _check_size(yaml.parse(text, Loader=yaml.SafeLoader))
    pending: list[Any] = [yaml.compose(text, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise YAMLRefused("a value holds a NUL character; remove it", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            pending += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _check_size(events: Any) -> None:
    """Count what would be built, before anything is."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            assert event.anchor is not None
            if any(anchor == event.anchor for anchor, _ in open_):
                raise YAMLRefused(f"{shorten('*' + event.anchor)} holds itself", event.start_mark)
            total += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_) > DEEPEST:
            raise YAMLRefused(f"nested more than {DEEPEST} deep", event.start_mark)
        if total > MOST_VALUES:
            raise YAMLRefused(f"it stands for more than {MOST_VALUES:,} values", event.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in first:
            before = first[key.tag, key.value]
            raise YAMLRefused(
                f"{shorten(key.value)} is given twice, first at line {before}; remove one",
                key.start_mark,
            )
        first[key.tag, key.value] = line


def read_given(value: str) -> dict[str, Any]:
    """Read the value of ``--config``: the path of a file, or settings themselves in braces.

    Raises:
        InputError: as :func:`read_settings`.
    """
    if not value.startswith("{"):
        return read_settings(value)
    try:
        settings = load_yaml(value)
    except yaml.YAMLError as error:
        raise InputError(f"config: {_syntax_error(error)}") from error
    assert isinstance(settings, dict), "in braces"
    return settings


def read_settings(path: str) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        InputError: it is missing, is not text, is not YAML or not to be read, or holds no mapping.
    """
    text = _read(path)
    try:
        settings = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {_syntax_error(error)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds no settings; write 'key: value' lines")
    return settings


def _read(path: str) -> str:
    if "\0" in path:
        raise InputError(f"config: {shorten(path)} is no path; it holds a NUL character")
    if path.startswith("{"):
        return path  # YAML itself
    if os.path.isdir(path):
        raise InputError(f"config: '{path}' is a folder; give a YAML file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(LARGEST + 1)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        present = os.listdir(folder) if os.path.isdir(folder) else []
        close = difflib.get_close_matches(os.path.basename(path), present, n=1)
        fix = f"; did you mean '{os.path.join(os.path.dirname(path), close[0])}'?" if close else ""
        fix = fix or "; name a YAML file that is there"
        raise InputError(f"config: there is no file '{path}'{fix}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config: '{path}' is not a text file; give a YAML file") from error


def _syntax_error(error: yaml.YAMLError) -> str:
    what = "" if isinstance(error, YAMLRefused) else "not valid YAML"
    if isinstance(error, yaml.MarkedYAMLError):
        if error.problem_mark is None:
            return ": ".join(filter(None, (what, error.problem)))
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        return f"{what} at {place}" if what else place
    return f"not valid YAML: {one_line(str(error))}"
