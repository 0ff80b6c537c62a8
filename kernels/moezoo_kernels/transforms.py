"""Whether torch's operators are wanted for what they are, and not only for their numbers.

Forward-mode derivatives and ``torch.func`` transform what is computed. Custom ops have no rule for
either: tangents would be dropped without a word, and a kernel that is called directly would read
memory that the tensors of ``vmap`` do not have. Modes and tracers watch operators, and would miss
what a kernel computes without one.
"""

from __future__ import annotations

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

_OF_DERIVATIVES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def is_transformed() -> bool:
    """Return whether a transformation of ``torch.func`` or a level of dual tensors is open.

    A compiler, which cannot trace the question, is told that none is: it sees ops, not memory.
    """
    return not torch.compiler.is_compiling() and _is_open()


def is_differentiated() -> bool:
    """Return whether derivatives are taken in another way than by ``backward``.

    That is ``torch.func.grad``, ``jvp`` and what is made of these, and dual tensors; not ``vmap``
    alone, for which torch runs a custom op once for each entry. Compilers cannot trace it.
    """
    if not _is_open():
        return False
    if forward_ad._current_level >= 0:
        return True
    stack = _functorch.get_interpreter_stack() or ()
    return any(interpreter.key() in _OF_DERIVATIVES for interpreter in stack)


def is_ordinary() -> bool:
    """Return whether nothing watches or transforms torch's operators. Compilers cannot trace it."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _is_open()
        or torch._C._get_tracing_state() is not None
    )


def _is_open() -> bool:
    """Ask torch 2.13, which keeps both in private."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None
