"""Colours of the pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Color:
    """One colour, as hexadecimal RGB, on white and on a dark ground."""

    light: str
    dark: str


# After Wong (Nature Methods 8, 441, 2011), each with enough contrast for thin lines on its ground.
GREY = Color("#6b7280", "#9aa5b4")


BLUE = Color("#0a66b0", "#5cb1f2")


RED = Color("#c4490a", "#f28b4f")


GREEN = Color("#05805f", "#35c79a")


PINK = Color("#b04a86", "#eb94c8")


OCHRE = Color("#967000", "#e2bb3a")


SKY = Color("#2f9bd6", "#a5dcff")


INDIGO = Color("#41338f", "#a99bf5")
