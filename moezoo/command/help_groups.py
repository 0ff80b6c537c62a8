"""The help of a training command: our options first, those of Lightning's trainer elsewhere.

The trainer has more options than all the rest, with texts of its own, and few of them matter to
most runs. One line says what shows them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAG = "--trainer.help"
"""The word that asks for the trainer's options."""

_NAMED = "--trainer.max_steps, --trainer.precision, --trainer.devices"
_CHECKPOINT = "last or best of the run's directory, or the path of a checkpoint"
_ORDER = ("Run", "Checkpoint", "model", "data")
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


@contextmanager
def grouped(parser: Any, trainer: bool) -> Iterator[None]:
    """Arrange the groups of a parser while this is open; one without a trainer's stays as it is.

    Args:
        parser: of a command.
        trainer: show the trainer's options, and nothing else.
    """
    groups = list(parser._action_groups)
    titles = [group.title for group in groups]
    by_trainer = [group for group in groups if _of(group, "trainer")]
    try:
        if by_trainer:
            for group in groups:
                group.title = _title(group)
                for action in group._group_actions:
                    if action.dest == "ckpt_path":
                        action.help = _CHECKPOINT
            rest = [group for group in groups if group not in by_trainer]
            parser._action_groups = (
                by_trainer if trainer else [*sorted(rest, key=_place), _pointer(parser, by_trainer)]
            )
        yield
    finally:
        parser._action_groups = groups
        for group, title in zip(groups, titles, strict=True):
            group.title = title


def _of(group: Any, key: str) -> bool:
    """Return whether a group's options are parts of a key."""
    return any(action.dest.startswith(f"{key}.") for action in group._group_actions)


def _title(group: Any) -> str | None:
    """Return the title for a terminal; what Lightning names by what it runs is a checkpoint's."""
    if any(action.dest == "ckpt_path" for action in group._group_actions):
        return "Checkpoint"
    if not group.title:
        return None
    title = _ROLE.sub(r"\1", group.title)
    return title[0].upper() + title[1:]


def _place(group: Any) -> int:
    """Return where a group stands: general options, the run, the model, the data, the rest."""
    if any(action.dest == "help" for action in group._group_actions):
        return -1
    for number, key in enumerate(_ORDER):
        if group.title == key or (_of(group, key) and group.title != "Linked arguments"):
            return number
    return len(_ORDER)


def _pointer(parser: Any, groups: list[Any]) -> Any:
    """Return a group without options that says how many there are, and what shows them."""
    names = {
        flag
        for group in groups
        for action in group._group_actions
        for flag in action.option_strings
        if flag.count(".") == 1 and not flag.endswith((".help", "+"))
    }
    more, name = len(names) - _NAMED.count("--"), parser.prog.replace(" [options]", "")
    return argparse._ArgumentGroup(
        parser,
        title="Trainer",
        description=f"{_NAMED} and {more} more options of Lightning's Trainer: {name} {FLAG}",
    )
