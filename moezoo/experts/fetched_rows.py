"""Rows of a table in main memory, brought to the device of the tokens before they are wanted.

:class:`RowFetches` begins to fetch the rows that a layer will read while the device still computes
what comes before it. A thread waits for the row numbers, gathers each row once into page-locked
memory, and has it copied to the device beside the computation, on a stream of its own; where the
tokens are in main memory, too, the thread gathers and nothing is copied. The gradient comes back as
the rows that were read.

Nothing that is computed depends on what was begun: rows are fetched when they are wanted unless
those very row numbers were announced and the table has not changed since.

Shapes: T tokens, K rows per token, U rows that are read, N rows of the table, V width of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moezoo_kernels.row_sums import sort_by_row, sparse_rows

_MOST = 8
"""Fetches of a table that are kept while nothing reads them; layers may share a table."""


def distinct_rows(indices_TK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the rows that are read, ``(U,)`` ascending, and each index's place among them.

    An index of -1 stays -1.
    """
    rows_U = sort_by_row(indices_TK, num_rows, only_used=True).rows
    assert rows_U is not None
    places_TK = torch.searchsorted(rows_U, indices_TK.contiguous())
    return rows_U, places_TK.masked_fill(indices_TK < 0, -1)


class Copies(Protocol):
    """How tensors get from main memory to a device and back, beside what that computes."""

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor, and return what waits for the copy in any thread."""

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised main memory that the device can copy from."""

    def to_device(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to copy tensors, and return what makes the computation wait for the copies."""


class _WaitedFor:
    """Copies to a device without streams, one after the other; within main memory there are none.

    Args:
        device: of the tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = tensor.cpu()
        return lambda: host

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def to_device(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        copied = tuple(tensor.to(self._device) for tensor in tensors)
        return lambda: copied


class _OnStream:
    """Copies on a stream of their own.

    Args:
        device: of the tokens, an accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = self.room(tuple(tensor.shape), tensor.dtype)
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        there = self._stream.record_event()

        def wait() -> Tensor:
            there.synchronize()
            return host

        return wait

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_device(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        with self._module.stream(self._stream):
            copied = tuple(t.to(self._device, non_blocking=True) for t in tensors)
        there = self._stream.record_event()

        def wait() -> tuple[Tensor, ...]:
            current = self._module.current_stream(self._device)
            current.wait_event(there)
            for tensor in copied:
                tensor.record_stream(current)
            return copied

        return wait


@lru_cache
def _copies(device: torch.device) -> Copies:
    if device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream"):
        return _OnStream(device)
    return _WaitedFor(device)


@lru_cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the thread that fetches; a process that was forked has none of its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix="moezoo-rows")


class _Fetch(NamedTuple):
    indices_TK: Tensor
    versions: tuple[int, int]
    found: Future[tuple[Tensor, Callable[[], tuple[Tensor, ...]]]]


class RowFetches:
    """Fetches of one table's rows that were begun and are not read yet."""

    def __init__(self) -> None:
        self._begun: list[_Fetch] = []

    def begin(self, weight: Tensor, indices_TK: Tensor) -> None:
        """Begin to fetch rows.

        Args:
            weight: ``(N, V)``, in main memory.
            indices_TK: int64 on the tokens' device, -1 for none; the very tensor that will be read.
        """
        self._begun = [*self._begun, _begin(weight, indices_TK)][-_MOST:]

    def read(self, weight: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows on the tokens' device, ``(U, V)``, and each index's place, ``(T, K)``.

        The weight's gradient is sparse and coalesced: the rows that were read.

        Args:
            weight: as for :meth:`begin`, and so is what follows.
            indices_TK: -1 where there is no row, and its place is -1.
        """
        fetch = self._take(weight, indices_TK)
        rows_U, wait = fetch.found.result()
        values_UV, places_TK = wait()
        read_UV: Tensor = _Read.apply(weight, rows_U, values_UV)
        return read_UV, places_TK.reshape(indices_TK.shape)

    def _take(self, weight: Tensor, indices_TK: Tensor) -> _Fetch:
        versions = _version(weight), _version(indices_TK)
        for number, fetch in enumerate(self._begun):
            if fetch.versions == versions and _is_same(fetch.indices_TK, indices_TK):
                del self._begun[number]
                return fetch
        self._begun = [fetch for fetch in self._begun if fetch.versions[0] == versions[0]]
        return _begin(weight, indices_TK)


def _begin(weight: Tensor, indices_TK: Tensor) -> _Fetch:
    device = indices_TK.device
    copies = _copies(device)
    numbers = copies.to_host(indices_TK.detach())
    versions = _version(weight), _version(indices_TK)
    found = _threads(os.getpid()).submit(_gather, weight.detach(), numbers, copies)
    return _Fetch(indices_TK, versions, found)


@torch.no_grad()
def _gather(
    weight: Tensor, numbers: Callable[[], Tensor], copies: Copies
) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
    rows_U, places_TK = distinct_rows(numbers(), weight.shape[0])
    values_UV = copies.room((len(rows_U), weight.shape[1]), weight.dtype)
    torch.index_select(weight, 0, rows_U, out=values_UV)
    places = copies.room(tuple(places_TK.shape), places_TK.dtype).copy_(places_TK)
    return rows_U, copies.to_device(values_UV, places)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same memory; one of them, which is kept, holds it."""
    whole = one.is_contiguous() and other.is_contiguous() and one.numel() == other.numel()
    return whole and one.device == other.device and one.data_ptr() == other.data_ptr()


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows_U: Tensor, values_UV: Tensor) -> Tensor:
        ctx.weight, ctx.rows = weight.detach(), rows_U
        return values_UV.view_as(values_UV)

    @staticmethod
    def backward(ctx: Any, gradient_UV: Tensor) -> tuple[Tensor, None, None]:
        weight: Tensor = ctx.weight
        return sparse_rows(ctx.rows, gradient_UV.to(weight.device), weight), None, None


def staying(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion, of dtype or device, without its move out of main memory.

    Args:
        convert: as ``nn.Module.to`` and its like apply it to every tensor of a module.
    """

    def convert_in_place(tensor: Tensor) -> Tensor:
        sample = convert(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        if sample.device.type in ("cpu", "meta"):
            return convert(tensor)
        if tensor.is_meta:
            return torch.empty_like(tensor, dtype=sample.dtype, device="cpu")
        return tensor.to(device="cpu", dtype=sample.dtype)

    return convert_in_place
