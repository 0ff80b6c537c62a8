"""Statistics that are computed at once, or only when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_MOST_BYTES = 1 << 22
"""What a layer's output may keep in memory for statistics that are not computed yet."""


class DeferredStats(Mapping[str, Tensor]):
    """Statistics that are computed when they are first read, and then kept.

    Args:
        compute: gives them.
    """

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute: Callable[[], dict[str, Tensor]] | None = compute
        self._found: dict[str, Tensor] = {}

    def _all(self) -> dict[str, Tensor]:
        if self._compute is not None:
            with torch.no_grad():
                self._found = self._compute()
            self._compute = None  # and what it holds
        return self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        """Copy and pickle as the plain dictionary."""
        return dict, (self._all(),)


def statistics(
    layer: nn.Module, compute: Callable[..., dict[str, Tensor]], *arguments: Any
) -> Mapping[str, Tensor]:
    """Compute statistics at once while a layer trains, else when they are read.

    Training logs them at every step. A token that is decoded would wait longer for them than for
    its output, and nothing reads them.

    Args:
        layer: whose they are.
        compute: gives them from the arguments.
        arguments: tensors among them are detached. Until the statistics are read they are kept;
            if that takes more than 4 MiB, the statistics are computed at once.
    """
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    at_once = layer.training or torch.compiler.is_compiling()
    if at_once or sum(a.nbytes for a in detached if isinstance(a, Tensor)) > _MOST_BYTES:
        with torch.no_grad():
            return compute(*detached)
    return DeferredStats(partial(compute, *detached))
