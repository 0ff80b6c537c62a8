"""Recipes by name: ``--recipe peer`` is ``--config configs/peer.yaml``, from any folder.

An installed package holds copies of the checkout's ``configs``, which ``setup.py`` puts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moezoo.errors import InputError, nearest

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return the folder of the recipes: that of the package, or of the checkout it lies in."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """List the recipes of ``moezoo fit``."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        InputError: there is none of that name; the nearest is proposed.
    """
    if name not in (known := names()):
        raise InputError(f"recipe: there is no '{name}'{nearest(name, known)}")
    return folder() / f"{name}.yaml"


def with_recipes(words: Sequence[str]) -> list[str]:
    """Replace ``--recipe NAME`` in a command line by ``--config FILE``, before its other files.

    Raises:
        InputError: a name is unknown, or missing.
    """
    files: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, name = word.partition("=")
        if option != "--recipe":
            others.append(word)
            continue
        if not equals and (not rest or rest[0].startswith("-")):
            raise InputError("recipe: a value is missing; write --recipe NAME")
        files.append(f"--config={find(name if equals else rest.pop(0))}")
    first = next((i for i, word in enumerate(others) if word.startswith("-")), len(others))
    return [*others[:first], *files, *others[first:]]
