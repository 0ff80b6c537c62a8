"""Layers and ops against public implementations of the same thing, at the same work.

`moezoo bench` is its command. A :class:`~moezoo.bench.case.Case` says what is computed, by which
implementations, and the target; :mod:`~moezoo.bench.runner` checks that outputs and gradients
agree, and only then measures; :mod:`~moezoo.bench.results` and :mod:`~moezoo.bench.pictures` write
the results.
"""

from moezoo.bench.case import (
    Case,
    Contender,
    Gradients,
    Package,
    Peer,
    Problem,
    Setting,
    Target,
    Unavailable,
    Work,
    plain_torch,
)
from moezoo.bench.runner import Measured, Options, Result, run_case

__all__ = [
    "Case",
    "Contender",
    "Gradients",
    "Measured",
    "Options",
    "Package",
    "Peer",
    "Problem",
    "Result",
    "Setting",
    "Target",
    "Unavailable",
    "Work",
    "plain_torch",
    "run_case",
]
