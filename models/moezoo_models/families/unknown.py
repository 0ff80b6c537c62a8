"""What to say of an architecture that is not known here."""

from __future__ import annotations

from collections.abc import Iterable

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moezoo.errors import nearest


def instead(kind: str, known: Iterable[str]) -> str:
    """Return which architectures there are, as the end of a message.

    The spelling of another one is offered only for what is none: transformers' ``phi`` is no slip
    for ``phi3``, and a file whose ``model_type`` is changed to that would be read wrongly.

    Args:
        kind: the ``model_type`` of a file.
        known: those that are taken.
    """
    known = sorted(known)
    return f"; choose from: {', '.join(known)}" if kind in CONFIG_MAPPING else nearest(kind, known)
