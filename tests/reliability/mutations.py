"""Ways to spoil a file: values of the wrong kind at each place of it, and damaged bytes.

Every mutation has a name that says what it is, and is the same each time. None is of a kind that
hangs or crashes a library: nesting is as deep and integers are as long as a reader may bound them.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEPTH = 200
DIGITS = 5_000
LETTERS = 100_000

JSON_KINDS = {
    "null": "null",
    "true": "true",
    "text": '"no"',
    "minus": "-1",
    "zero": "0",
    "fraction": "0.5",
    "nan": "NaN",
    "infinity": "1e999",
    "list": "[]",
    "object": "{}",
    "nested": "[" * DEPTH + "]" * DEPTH,
    "huge": "9" * DIGITS,
    "long": f'"{"x" * LETTERS}"',
}
YAML_KINDS = {**JSON_KINDS, "nan": ".nan", "infinity": ".inf", "date": "2001-01-01"}
"""Wrong kinds of values, as they are written."""

_MARK = "@@value@@"
_AGAIN = "@@again@@"
Path_ = tuple[Any, ...]


@dataclass(frozen=True)
class Mutation:
    """One way to spoil an artefact.

    Attributes:
        name: what is done, e.g. ``config.json hidden_size: null``.
        apply: does it to a copy of the artefact, whose folder it is given.
        unprivileged: whether it only shows where permissions count.
    """

    name: str
    apply: Callable[[Path], Any]
    unprivileged: bool = False


def of_bytes(name: str, size: int, text: bool = False) -> Iterator[Mutation]:
    """Damage the bytes of a file.

    Args:
        name: of the file, in the artefact.
        size: its length.
        text: whether it is text, which may come in another encoding.
    """

    def write(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))

    yield Mutation(f"{name} is empty", write(lambda data: b""))
    yield Mutation(f"{name} is missing", lambda folder: (folder / name).unlink())
    yield Mutation(f"{name} is a folder", lambda folder: _make_folder(folder / name))
    yield Mutation(f"{name} may not be read", lambda folder: (folder / name).chmod(0), True)
    yield Mutation(f"{name} is half", write(lambda data: data[: len(data) // 2]))
    yield Mutation(f"{name} lacks its last bytes", write(lambda data: data[:-3]))
    yield Mutation(f"{name} goes on with NUL", write(lambda data: data + bytes(64)))
    yield Mutation(f"{name} is zeros", write(lambda data: bytes(len(data))))
    yield Mutation(f"{name} is a link to itself", lambda folder: _loop(folder / name))
    if text:
        yield Mutation(f"{name} is UTF-16", write(lambda data: data.decode().encode("utf-16")))
        yield Mutation(f"{name} is Latin-1", write(lambda data: data + b"\n# \xe9\n"))
        yield Mutation(f"{name} has a BOM", write(lambda data: b"\xef\xbb\xbf" + data))
        yield Mutation(f"{name} has NUL", write(lambda data: b"\0" + data))
    chance = random.Random(name)
    for position in sorted({0, 4, size // 2, size - 6, *(chance.randrange(size) for _ in "12345")}):
        yield Mutation(
            f"{name} byte {position} is flipped", write(lambda d, at=position: _flip(d, at))
        )


def of_json(
    name: str, document: Any, text: Callable[[Path, str], Any] | None = None, **limits: int
) -> Iterator[Mutation]:
    """Spoil each value of a JSON document.

    Args:
        name: of the file, in the artefact.
        document: what is in it.
        text: writes what it becomes; default: into the file as it is.
        limits: of :func:`places`.
    """

    def write(change: Callable[[Any], Any], fill: str) -> Callable[[Path], Any]:
        def apply(folder: Path) -> None:
            written = json.dumps(change(copy.deepcopy(document)))
            written = written.replace(f'"{_MARK}"', fill).replace(_AGAIN, "")
            (text or Path.write_text)(folder / name, written)

        return apply

    yield from _of_tree(name, document, write, JSON_KINDS, **limits)


def of_yaml(name: str, document: Any, **limits: int) -> Iterator[Mutation]:
    """Spoil each value of a YAML document."""
    import yaml

    def write(change: Callable[[Any], Any], fill: str) -> Callable[[Path], Any]:
        def apply(folder: Path) -> None:
            written = yaml.safe_dump(change(copy.deepcopy(document)), sort_keys=False)
            written = written.replace(f"'{_MARK}'", fill).replace(_MARK, fill).replace(_AGAIN, "")
            (folder / name).write_text(written)

        return apply

    yield from _of_tree(name, document, write, YAML_KINDS, **limits)


def of_objects(
    name: str, document: Any, save: Callable[[Any, Path], Any], **limits: int
) -> Iterator[Mutation]:
    """Spoil each value of a document of Python objects.

    Args:
        name: of the file, in the artefact.
        document: what is in it.
        save: writes what it becomes.
        limits: of :func:`places`.
    """
    kinds = {kind: json.loads(text) for kind, text in JSON_KINDS.items() if kind != "huge"}

    for place in places(document, **limits):
        for kind, value in {**kinds, "huge": 10**40, "number key": {7: 7}, "tuple": ()}.items():
            yield Mutation(
                f"{name} {_dotted(place)}: {kind}",
                lambda folder, at=place, new=value: save(
                    _put(_shallow(document, at), at, new), folder / name
                ),
            )
        if place and isinstance(_get(document, place[:-1]), dict):
            yield Mutation(
                f"{name} {_dotted(place)}: dropped",
                lambda folder, at=place: save(_drop(_shallow(document, at), at), folder / name),
            )


def places(document: Any, depth: int = 4, width: int = 40, first: int = 1) -> Iterator[Path_]:
    """Yield where there are values: keys and the first items of lists, so deep and so many."""
    yield ()
    if depth == 0:
        return
    if isinstance(document, dict):
        inner = list(document.items())[:width]
    elif isinstance(document, list | tuple):
        inner = list(enumerate(document))[:first]
    else:
        return
    for key, value in inner:
        for place in places(value, depth - 1, width, first):
            yield (key, *place)


def _of_tree(
    name: str, document: Any, write: Any, kinds: dict[str, str], **limits: int
) -> Iterator[Mutation]:
    for place in places(document, **limits):
        for kind, text in kinds.items():
            if text == json.dumps(_get(document, place)):
                continue
            yield Mutation(
                f"{name} {_dotted(place)}: {kind}",
                write(lambda tree, at=place: _put(tree, at, _MARK), text),
            )
        if place and isinstance(place[-1], str):
            where = f"{name} {_dotted(place)}"
            yield Mutation(f"{where}: dropped", write(lambda tree, at=place: _drop(tree, at), ""))
            yield Mutation(f"{where}: renamed", write(lambda tree, at=place: _rename(tree, at), ""))
            yield Mutation(
                f"{where}: twice", write(lambda tree, at=place: _double(tree, at), '"no"')
            )


def _get(tree: Any, place: Path_) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _shallow(tree: Any, place: Path_) -> Any:
    """Copy what lies on the way to a place, and nothing else."""
    if not place:
        return tree
    new = dict(tree) if isinstance(tree, dict) else list(tree)
    new[place[0]] = _shallow(tree[place[0]], place[1:])
    return new


def _put(tree: Any, place: Path_, value: Any) -> Any:
    if not place:
        return value
    _get(tree, place[:-1])[place[-1]] = value
    return tree


def _drop(tree: Any, place: Path_) -> Any:
    del _get(tree, place[:-1])[place[-1]]
    return tree


def _rename(tree: Any, place: Path_) -> Any:
    owner = _get(tree, place[:-1])
    owner[f"{place[-1]}x"] = owner.pop(place[-1])
    return tree


def _double(tree: Any, place: Path_) -> Any:
    _get(tree, place[:-1])[f"{place[-1]}{_AGAIN}"] = _MARK
    return tree


def _dotted(place: Path_) -> str:
    # Keys that are paths, or spell options out, would make long names that change.
    return ".".join(re.sub(r"^/.*|{.*}", "*", str(key)) for key in place) or "(all)"


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def _make_folder(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    os.symlink(path.name, path)
