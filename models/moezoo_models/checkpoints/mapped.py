"""Weights as views of their files: nothing is copied, also where experts are stacked.

transformers stacks experts that a file holds one by one. Where they lie in the file at equal
distances, as our conversions write them, the stack is a view of the file as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moezoo_models.files.gate import Admitted
from moezoo_models.files.model_files import DTYPES


def map_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Map all tensors of safetensors files that are known to be sound; those of one share storage.

    What is written to them stays in memory. Tensors that lie at no multiple of their dtype's size,
    as the format allows, are copied.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with file.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(start - 8))
        size = file.stat().st_size
        content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                part, dtype = content[start + begin : start + end], DTYPES[info["dtype"]]
                if part.storage_offset() % dtype.itemsize:  # which no view of numbers can have
                    part = part.clone()
                found[name] = part.view(dtype).view(info["shape"])
    return found


@contextmanager
def opened_as_views(admitted: Admitted) -> Iterator[dict[str, Tensor]]:
    """Map the files of a directory, by name; what is stacked of them meanwhile is a view, too."""
    found = map_tensors(admitted.files)
    with StacksAsViews():
        yield {
            name: found[name] if info.part is None else info.part.of(found[info.part.name])
            for name, info in admitted.tensors.items()
        }


class StacksAsViews(TorchFunctionMode):
    """While active, ``torch.stack`` and ``torch.cat`` copy nothing where a view has the result."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Try a view."""
        found = None
        if func in (torch.stack, torch.cat) and args:
            found = (_stacked if func is torch.stack else _joined)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """Return the stack as a view if the tensors lie at equal distances of one storage."""
    first, distance = tensors[0], _distance(tensors)
    if distance is None or dim != 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """Return the tensors, one behind the other along a dimension, as a view if they lie so."""
    first, distance = tensors[0], _distance(tensors)
    if distance is None or distance != first.shape[dim] * first.stride(dim):
        return None
    shape = list(first.shape)
    shape[dim] *= len(tensors)
    return first.as_strided(shape, first.stride())


def _distance(tensors: Sequence[Tensor]) -> int | None:
    """Return how many elements lie from each tensor to the next, if it is always as many."""
    first = tensors[0]
    same = all(
        each.shape == first.shape
        and each.stride() == first.stride()
        and each.dtype == first.dtype
        and each.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for each in tensors
    )
    places = [int(each.storage_offset()) for each in tensors]
    distances = {b - a for a, b in pairwise(places)}
    if not same or len(distances) != 1 or (distance := distances.pop()) <= 0:
        return None
    return distance
