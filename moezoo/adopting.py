"""`moezoo.adopt`, which stands in a package that knows transformers and is loaded when called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moezoo.routing import BalanceOptions


def adopt(
    model: nn.Module,
    *,
    balance: BalanceOptions | Mapping[str, Any] | None = None,
    where: Callable[[str], bool] | None = None,
) -> Any:
    """Compute the mixture blocks of a transformers model by :class:`moezoo.SparseMoE`, in place.

    Weights are shared, and their names in the model stay. Every block is tried out on random tokens
    before any is changed: output and gradients differ by no more than rounding, or the model is
    refused. See :func:`moezoo_models.adopt.adopt`.

    Args:
        model: as ``from_pretrained`` returns it.
        balance: auxiliary losses of the layers, or a mapping of such options; default: none.
        where: which blocks, by a function of their names in the model; default: all.

    Returns:
        A :class:`moezoo_models.adopt.Adopted`: the layers, and what they return beside hidden
        states.

    Raises:
        InputError: an argument is of another kind; there is no mixture block, or one that cannot
            be held exactly.
    """
    adopting = importlib.import_module("moezoo_models.adopt")
    return adopting.adopt(model, balance=balance, where=where)
