"""Runs that are named on the command line of ``moezoo compare``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence


def with_list(words: Sequence[str]) -> list[str]:
    """Return a command line whose first words, those without dashes, are the list ``--runs``."""
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return [f"--runs={json.dumps(runs)}", *words[len(runs) :]]


def help_of_runs() -> str:
    """Return the end of the help of ``moezoo compare``."""
    return (
        "\nmoezoo compare RUN RUN ... [--output DIR] draws runs of moezoo fit over each\n"
        "other, in one picture and one table; with --law, also fits a scaling law to\n"
        "them.\n"
    )
