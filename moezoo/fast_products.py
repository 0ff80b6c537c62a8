"""A model's linear maps by the library that multiplies faster: for models of other projects."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import nn

from moezoo.errors import InputError
from moezoo_kernels.linear import Linear

_CONV = ("transformers.pytorch_utils", "Conv1D")
_FAST_CONV = "moezoo.fast_conv"


class FastProducts(NamedTuple):
    """What :func:`use_fast_products` did.

    Attributes:
        taken: names of the linear maps that it changed.
        left: names of those that stay as they are, with the class that has a forward of its own.
    """

    taken: tuple[str, ...]
    left: dict[str, str]


def use_fast_products(model: nn.Module, on: bool = True) -> FastProducts:
    """Multiply a model's linear maps by the library that is faster here from now on, in place.

    In fp32 on a CPU, large products then go to oneDNN where that is clearly faster than torch's own
    (:func:`moezoo_kernels.linear.linear`); everywhere else nothing changes. Each ``nn.Linear``, and
    each ``Conv1D`` of transformers' GPT-2, gets a subclass of its class that differs in
    ``forward`` alone: parameters, names, hooks and state stay. Models of this project need no call.

    Args:
        model: any module, on any device.
        on: False gives the original classes back, for tools that look for exactly ``nn.Linear``,
            such as ``torch.ao.quantization.quantize_dynamic``; in this project's models, too.

    Returns:
        Which maps changed, and which were left, because their class has a forward of its own, or
        because something has replaced theirs.

    Raises:
        InputError: the model has no linear map.
    """
    taken: list[str] = []
    left: dict[str, str] = {}
    maps = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv(m)}
    if not maps:
        raise InputError(f"model: {type(model).__name__} has no linear map; give one that has some")
    for name, module in maps.items():
        kind, (plain, fast) = type(module), _classes(module)
        if kind not in (plain, fast):
            left[name] = kind.__name__
        elif "forward" in vars(module):
            left[name] = f"{kind.__name__} with another forward"
        elif (kind is fast) != on:
            module.__class__ = fast if on else plain
            taken.append(name)
    return FastProducts(tuple(taken), left)


def _classes(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]]:
    """Return the class of a map as its library has it, and the one of fast products."""
    if _is_conv(module):
        made = importlib.import_module(_FAST_CONV)
        return made.Conv1D, made.FastConv1D
    return nn.Linear, Linear


def _is_conv(module: nn.Module) -> bool:
    """Return whether a module is a linear map of GPT-2's; transformers need not be there."""
    return any((base.__module__, base.__name__) == _CONV for base in type(module).__mro__)
