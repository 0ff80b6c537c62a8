"""The number formats of a GGUF file: F32, F16, and Q8_0, which is 32 numbers and their scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moezoo.errors import InputError, check_choice
from moezoo_models.export.gguf.library import library
from moezoo_models.export.gguf.tensors import Stored

DTYPES = ("f32", "f16", "q8_0")
"""What ``--dtype`` chooses from."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""llama.cpp's numbers of files that are mostly in a format."""

BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""

_LARGEST_HALF = 65504.0


def check_dtype(dtype: str) -> str:
    """Return the format if it is one of :data:`DTYPES`.

    Raises:
        InputError: it is none.
    """
    return check_choice("dtype", dtype, DTYPES)


def encoding_of(stored: Stored, dtype: str) -> str:
    """Return the format that a tensor is written in, if the file is to be in ``dtype``.

    Vectors and routers stay in F32; rows that blocks of 32 do not divide are in F16 where the rest
    is in Q8_0.
    """
    if stored.exact:
        return "f32"
    if dtype == "q8_0" and stored.shape[-1] % BLOCK:
        return "f16"
    return dtype


def empty(shape: tuple[int, ...], encoding: str) -> np.ndarray[Any, Any]:
    """Return room for a tensor, as the file has it."""
    if encoding == "q8_0":
        gguf = library()
        bytes_ = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType.Q8_0)
        return np.empty(bytes_, dtype=np.uint8)
    return np.empty(shape, dtype=np.float16 if encoding == "f16" else np.float32)


def encode(name: str, tensor: Tensor, encoding: str) -> np.ndarray[Any, Any]:
    """Return a tensor as the file has it.

    Args:
        name: for messages.
        tensor: fp32.
        encoding: f32, f16 or q8_0.

    Raises:
        InputError: a number is too large for F16.
    """
    numbers = tensor.contiguous().numpy()
    if encoding == "f32":
        return numbers
    if encoding == "f16":
        _check_half(name, tensor)
        return numbers.astype(np.float16)
    gguf = library()
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    return encoded


def decode(encoded: np.ndarray[Any, Any], encoding: str) -> Tensor:
    """Return in fp32 what :func:`encode` made of a tensor."""
    if encoding != "q8_0":
        return torch.from_numpy(encoded.astype(np.float32))
    gguf = library()
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(encoded, kind)))


def _check_half(name: str, tensor: Tensor) -> None:
    if tensor.numel() and float(tensor.abs().max()) > _LARGEST_HALF:
        raise InputError(
            f"dtype: '{name}' holds numbers above {_LARGEST_HALF:,.0f}, the largest of F16; write "
            "--dtype f32"
        )
