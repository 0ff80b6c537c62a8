"""Copies of weights in large pages, which one CPU core reads from memory half as fast again.

Hardware asks for memory in advance only up to the end of a page, and torch's memory comes in pages
of 4 KiB, unless the system hands out larger ones unasked. (Weights that are views of a file come in
whatever its file system's cache keeps, which is larger on current ones.)
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

_PAGE: Final = 2 << 20
_ADVICE: Final = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor, without its history, in large pages if it fills some.

    Args:
        tensor: of any shape, strides, dtype and device; large pages are a CPU's.
    """
    size = tensor.nbytes
    if _ADVICE is None or tensor.device.type != "cpu" or size < _PAGE:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    room = -(-size // _PAGE) * _PAGE + _PAGE
    memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without large pages; the memory is as good as any
        memory.madvise(_ADVICE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)  # it keeps the memory
    begin = -pages.data_ptr() % _PAGE
    copy = pages[begin : begin + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor.detach())
