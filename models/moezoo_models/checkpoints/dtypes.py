"""In which dtype a checkpoint's weights are loaded to be run.

Many CPUs multiply bf16 or fp16 many times slower than fp32. There, weights saved in 16 bits are
loaded in fp32, exactly, unless that does not fit into memory or another dtype is asked for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from moezoo import dtype_speed
from moezoo.errors import check_choice
from moezoo_models.devices import free_memory

if TYPE_CHECKING:
    from moezoo_models.files.gate import Admitted

AUTO = "auto"
CHOICES = {kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16")}
_HALF = (torch.bfloat16, torch.float16)


def choose_dtype(admitted: Admitted, wanted: str | None, device: str | torch.device) -> torch.dtype:
    """Return the dtype that a model is loaded in; where products are slow, one line says so.

    Args:
        admitted: the checkpoint.
        wanted: float32, bfloat16 or float16; auto for the one it was saved in, or fp32 where that
            is slow; None for the one it was saved in, whatever it costs.
        device: where the model will run.

    Raises:
        InputError: there is no such dtype.
    """
    saved = admitted.dtype
    if wanted is None:
        return saved
    check_choice("dtype", wanted, [AUTO, *CHOICES])
    dtype = CHOICES.get(wanted, saved)
    if torch.device(device).type != "cpu" or dtype not in _HALF or not dtype_speed.is_slow(dtype):
        return dtype
    name = str(dtype).removeprefix("torch.")
    times = dtype_speed.ratio(dtype_speed.speeds().slowdown(dtype))
    cost = f"products in {name} take about {times} as long as in float32 on this CPU"
    if wanted != AUTO:
        _say(cost)
        return dtype
    size = 4 * sum(info.numel for info in admitted.tensors.values())
    if size > free_memory():
        _say(f"{cost}, and the {size / 1e9:.1f} GB of float32 weights do not fit into memory")
        return dtype
    _say(f"{cost}, so the weights are loaded in float32; --dtype {name} keeps them")
    return torch.float32


def _say(what: str) -> None:
    print(f"dtype: {what}", file=sys.stderr)
