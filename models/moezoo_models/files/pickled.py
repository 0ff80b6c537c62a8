"""Files of ``torch.save`` (``pytorch_model.bin``), read without running what they could contain."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from moezoo.errors import InputError


def read_pickled(file: Path) -> dict[str, Tensor]:
    """Map a state dict into memory; pages are read when they are touched.

    torch's restricted unpickler builds tensors and plain containers, and stops at anything else
    before it is called.

    Raises:
        InputError: the file holds something else, or cannot be read.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"'{found[1]}'" if found else "more than tensors"
        raise InputError(
            f"checkpoint: {file} contains {what}, and unpickling that could run any code; get the "
            "weights as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"checkpoint: {file} is truncated, damaged or older than torch 1.6; copy it again, or "
            "convert it to safetensors"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint: {file} holds a {type(content).__name__}, not a state dict")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"checkpoint: '{name}' in {file} is no dense tensor; save a plain state dict"
            )
    return {str(name): tensor.detach() for name, tensor in content.items()}
