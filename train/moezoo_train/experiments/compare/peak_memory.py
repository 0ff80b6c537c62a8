"""The most memory that one run of several in a process takes."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measure the most memory that was held while a block ran, apart from earlier blocks.

    On CUDA it is what torch's allocator held on the device. On a CPU it is the resident memory of
    the whole process, interpreter, libraries and mapped text included. Linux's high-water mark is
    reset at the start. Where it cannot be reset, it says something of the block only if the block
    raised it.

    Attributes:
        peak: bytes, after the block; None where it is not known.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        """Free what earlier blocks left, and start again from what is held now."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif not _reset_resident_peak():
            self._before = _largest_ever()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Read the mark."""
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        elif self._before is None:
            self.peak = _resident_peak()
        else:
            ever = _largest_ever()
            self.peak = ever if ever is not None and ever > self._before else None


def _reset_resident_peak() -> bool:
    """Set Linux's high-water mark to what is resident now; say whether that was possible."""
    if not Path("/proc/self/clear_refs").exists():
        return False
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)  # else memory that earlier blocks freed stays resident
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return _resident_peak() is not None


def _resident_peak() -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    except OSError:
        return None
    return 1024 * int(found[0]) if found else None


def _largest_ever() -> int | None:
    try:
        import resource
    except ImportError:
        return None  # Windows
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
