"""Precedence of settings: the command line wins over files, whatever its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jsonargparse import _typehints

from moezoo.errors import InputError

_CONFIG = ("--config", "-c")


class _Item(NamedTuple):
    """An option with its value, or a word that is neither.

    Attributes:
        words: as they stand on the command line, one or two.
        key: dotted name of the option; empty for other words.
        value: what it is set to, if anything.
    """

    words: list[str]
    key: str
    value: str | None


def ordered(arguments: Sequence[str]) -> list[str]:
    """Sort configuration files first, and an option before those that are part of it.

    The parser applies one after the other, so that of a file and an option the later would win,
    and arguments of a class would go to whatever class was set before.

    Args:
        arguments: the words of a command line.

    Returns:
        The same words; the order of files, and of what is appended to lists, is kept.

    Raises:
        InputError: an option that has parts on the command line is given twice and differently: it
            does not say which of the two they belong to.
    """
    items = list(_items(arguments))
    files = [item for item in items if item.words[0].partition("=")[0] in _CONFIG]
    rest = [item for item in items if item not in files]
    first = next((i for i, item in enumerate(rest) if item.words[0].startswith("-")), len(rest))
    items = [*rest[:first], *files, *rest[first:]]
    for key in dict.fromkeys(item.key for item in items if item.key):
        items = _before_its_parts(key, items)
    return [word for item in items for word in item.words]


def without_middle(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the words by position out that are neither the first nor the last of them.

    Args:
        arguments: the words of a command line, in which no flag stands without a value.

    Returns:
        Those that were taken out, and the others.
    """
    items = list(_items(arguments))
    places = [i for i, item in enumerate(items) if not item.key and len(item.words) == 1]
    places = [i for i in places if not items[i].words[0].startswith("-")]
    taken = set(places[1:-1])
    kept = [word for i, item in enumerate(items) if i not in taken for word in item.words]
    return [items[i].words[0] for i in sorted(taken)], kept


def _items(arguments: Sequence[str]) -> Iterator[_Item]:
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not (name.startswith("--") or name in _CONFIG):
            yield _Item([word], "", None)
            continue
        key = name.lstrip("-").removesuffix(".class_path")
        if equals:
            yield _Item([word], key, value)
        elif words and not words[0].startswith("--"):
            yield _Item([word, words[0]], key, words.pop(0))
        else:
            yield _Item([word], key, None)


def _before_its_parts(key: str, items: list[_Item]) -> list[_Item]:
    """Move the options named ``key`` before the first that sets a part of it."""
    parts = [i for i, item in enumerate(items) if item.key.startswith(f"{key}.")]
    # What is appended to a list has its own parts behind it, in the order of the list.
    if not parts or any(item.key == f"{key}+" for item in items):
        return items
    own = [item for item in items if item.key == key]
    values = dict.fromkeys(item.value for item in own)
    if len(values) > 1:
        raise InputError(
            f"{key}: given more than once ({', '.join(map(str, values))}), and --"
            f"{items[parts[0]].key} does not say which of them it is for; give --{key} once"
        )
    ahead = items[: parts[0]]
    return [
        *ahead,
        *(item for item in own if item not in ahead),
        *(item for item in items[parts[0] :] if item.key != key),
    ]


@contextmanager
def unmixed() -> Iterator[None]:
    """Make what replaces a class or a list inherit nothing from it, while this is open.

    jsonargparse hands arguments on where the new class has arguments of these names (PEER would
    search for 2 experts because a mixture in the file had ``top_k: 2``), and merges lists of equal
    length place by place (a rule for layer 3 would keep arguments of one for every layer).
    """
    adapt = _typehints.adapt_typehints

    def adapt_alone(value: Any, *args: Any, **kwargs: Any) -> Any:
        both = isinstance(value, list) and isinstance(kwargs.get("prev_val"), list)
        if both and not kwargs.get("append"):
            kwargs["prev_val"] = None
        return adapt(value, *args, **kwargs)

    replacements = {
        "adapt_typehints": adapt_alone,
        "discard_init_args_on_class_path_change": _discard,
    }
    before = {name: getattr(_typehints, name) for name in replacements}
    try:
        for name, function in replacements.items():
            setattr(_typehints, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(_typehints, name, function)


def _discard(parser: Any, previous: Any, value: Any) -> None:
    """Remove the previous class's arguments, in place, unless it is the class of ``value``."""
    if not previous or not previous.get("init_args"):
        return
    before, after = (_typehints.import_object(each["class_path"]) for each in (previous, value))
    if before is not after:
        previous.pop("init_args")
