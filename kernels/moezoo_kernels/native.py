"""The C++ kernels for CPUs: which library is loaded, or why none is.

`pip install` builds one shared library per instruction set from ``kernels/csrc`` if it finds a
compiler. The best one that this processor runs is loaded at the first use. ``MOEZOO_NATIVE``
chooses another (avx512, avx2, generic), or none (off).
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 12  # of the exported functions; csrc/version.cpp says the same

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_FOR_CAPABILITY = {
    "AVX512": ("avx512", "avx2", "generic"),
    "AVX2": ("avx2", "generic"),
}
_log = logging.getLogger(__name__)


class Library(NamedTuple):
    """A loaded library.

    Attributes:
        name: its instruction set: avx512, avx2 or generic.
        functions: the exported functions.
    """

    name: str
    functions: ctypes.CDLL


@cache
def load() -> Library | str:
    """Load the best library that runs here, or say in one line why there is none."""
    wanted = os.environ.get("MOEZOO_NATIVE")
    if wanted == "off":
        return "switched off by MOEZOO_NATIVE=off"
    names = _FOR_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), ("generic",))
    if wanted and wanted not in names:
        return f"MOEZOO_NATIVE={wanted} does not run here; choose from: {', '.join(names)}, off"
    reason = "not built: no C++ compiler when moezoo was installed; install one and reinstall"
    for name in (wanted,) if wanted else names:
        for path in sorted(Path(__file__).parent.glob(f"_native_{name}.*")):
            try:
                functions = ctypes.CDLL(str(path))
                if functions.moezoo_version() == VERSION:
                    return Library(name, functions)
                reason = f"{path.name} was built from other sources; reinstall moezoo"
            except (OSError, AttributeError) as error:
                reason = f"{path.name} cannot be loaded: {error}"
    return reason


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the C++ kernels do not run on this device in this dtype; None if they do."""
    if device.type != "cpu":
        return "needs a CPU device"
    if dtype not in _DTYPES:
        return f"has fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
    library = load()
    return library if isinstance(library, str) else None


def loaded_name() -> str:
    """Return the instruction set of the library that is loaded; off if there is none."""
    library = load()
    return "off" if isinstance(library, str) else library.name


@cache
def warn_once() -> None:
    """Log, once per process, that plain torch runs where a kernel could."""
    library = load()
    if isinstance(library, str) and os.environ.get("MOEZOO_NATIVE") != "off":
        _log.warning("moezoo: C++ kernels are %s. Plain torch runs instead, slower.", library)


def function(name: str) -> Any:
    """Return an exported function.

    Raises:
        RuntimeError: no library is loaded; ask :func:`unusable` first.
    """
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"C++ kernels: {library}")
    return getattr(library.functions, name)  # remembers, where [name] would look it up again


def call(name: str, *arguments: Tensor | int | float | bool | None) -> None:
    """Call an exported function with contiguous tensors and numbers, then the number of threads.

    A tensor is passed as a pointer to its data, None as a null pointer, bool and int as int64_t,
    float as double. The interpreter's lock is released meanwhile.

    Args:
        name: of the function.
        arguments: its arguments but the last, ``int32_t threads``.
    """
    converted = [_convert(argument) for argument in arguments]
    function(name)(*converted, ctypes.c_int32(torch.get_num_threads()))


class Prepared:
    """A call that is made again and again with the same tensors: its arguments converted once.

    Args:
        name: of the function.
        arguments: its arguments but those given with each call, which come first, and the last;
            as for :func:`call`. The tensors are kept, and must keep their memory.
    """

    def __init__(self, name: str, *arguments: Tensor | int | float | bool | None) -> None:
        self._function = function(name)
        self._kept = arguments
        self._converted = [_convert(argument) for argument in arguments]

    def __call__(self, *first: Tensor | int) -> None:
        """Call the function with these arguments before the prepared ones."""
        converted = [_convert(argument) for argument in first]
        threads = ctypes.c_int32(torch.get_num_threads())
        self._function(*converted, *self._converted, threads)


def _convert(
    argument: Tensor | int | float | bool | None,
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        assert argument.is_contiguous(), "the C++ kernels read contiguous data"
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument)


def floats(*shape: int) -> Tensor:
    """Return fp32 memory of a shape for a kernel to write, whatever torch's default dtype is.

    Lightning's ``bf16-true`` changes that default: half the memory, of which C++ would write all.
    """
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def dtype_code(dtype: torch.dtype) -> int:
    """Return the number by which the C++ kernels know a dtype."""
    return _DTYPES[dtype]
