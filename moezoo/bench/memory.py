"""Memory beside time: what is kept for the backward, and what is needed for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moezoo.bench.case import Contender


def saved_bytes(contender: Contender) -> int:
    """Count the bytes that autograd keeps between forward and backward.

    Operands and constants, which are there anyway, do not count.
    """
    given = [*contender.operands.values(), *contender.constants]
    with contender.within(), saved_storages(given) as kept:
        output = contender.forward()
    del output
    return sum(kept.values())


@contextmanager
def saved_storages(given: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Note what autograd keeps of the forward passes inside, without computing anything more.

    Every storage counts once and whole, as that is what stays allocated. Real and fake tensors are
    seen alike. Keep what the forward passes return until the end, so that no address is used twice.

    Args:
        given: tensors that are there anyway, and do not count.

    Yields:
        The bytes of every storage that is kept, by its address; it fills while inside.
    """
    known = {storage_key(tensor) for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and (key := storage_key(tensor)) not in known:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def storage_key(tensor: Tensor) -> int:
    """Return an id of a strided tensor's storage among those alive, fake ones included."""
    return int(tensor.untyped_storage()._cdata)


def temporary_bytes(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    """Find the most memory that one call held beyond what it was given and what it returns.

    On a CPU every allocation of torch's allocator is traced by its profiler, and those of the
    returned gradients are left out; memory that C++ code takes elsewhere is not seen. On CUDA it is
    the caching allocator's peak less the size of what is returned.

    Args:
        step: gives gradients.
        device: where it runs.
    """
    if device.type == "cuda":
        return _peak_cuda(step, device)
    # Kineto reports its own start and stop on stderr unless told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        returned = step()
    pointers = {pointer for tensor in returned for pointer in _pointers(tensor)}
    return highest(_allocations(profile), pointers)


class Allocation(NamedTuple):
    """One event of an allocator.

    Attributes:
        time: when, in nanoseconds.
        pointer: address.
        size: bytes; negative where memory is given back.
    """

    time: int
    pointer: int
    size: int


def _allocations(profile: Any) -> list[Allocation]:
    """List what a profiled block allocated and freed, in order."""
    tree = profile.profiler.kineto_results.experimental_event_tree()
    found = [
        Allocation(event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _walk(tree)
        if event.tag == torch._C._profiler._EventType.Allocation
    ]
    return sorted(found, key=lambda event: event.time)


def highest(events: Iterable[Allocation], kept: set[int]) -> int:
    """Replay allocations and give the most that was held, without those in ``kept`` at the end.

    An address may be used, freed and used again: only its last use, which was not freed, is left
    out. What had been allocated before the first event is not counted when it is freed.
    """
    lives: list[tuple[int, int, int, int | None]] = []  # start, pointer, size, end
    open_at: dict[int, int] = {}
    for index, event in enumerate(events):
        if event.size >= 0:
            open_at[event.pointer] = len(lives)
            lives.append((index, event.pointer, event.size, None))
        elif event.pointer in open_at:
            position = open_at.pop(event.pointer)
            start, pointer, size, _ = lives[position]
            lives[position] = (start, pointer, size, index)
    changes = []
    for start, pointer, size, end in lives:
        if end is None and pointer in kept:
            continue
        changes.append((start, size))
        if end is not None:
            changes.append((end, -size))
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


def _walk(events: Iterable[Any]) -> Iterable[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def _pointers(tensor: Tensor) -> list[int]:
    """Return the addresses of a gradient, of a sparse one those of its parts."""
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
        return [part.untyped_storage().data_ptr() for part in parts]
    return [tensor.untyped_storage().data_ptr()]


def _peak_cuda(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    size = sum(
        part.untyped_storage().nbytes()
        for tensor in returned
        for part in (
            [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]
        )
    )
    return max(0, peak - size)
