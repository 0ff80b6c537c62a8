"""All cases: those of ops and layers, and those that other packages declare."""

from __future__ import annotations

import importlib

from moezoo.bench.case import Case
from moezoo.bench.cases import CASES

FURTHER = ("moezoo_train.bench",)
"""Modules with further ``CASES``, by name: they import this package, and not the other way."""


def every_case() -> list[Case]:
    """Return all cases, in the order in which they are run and shown."""
    return [*CASES, *(case for name in FURTHER for case in importlib.import_module(name).CASES)]
