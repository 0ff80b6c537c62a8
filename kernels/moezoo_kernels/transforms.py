"""Whether torch transforms what is computed, by forward-mode derivatives or ``torch.func``.

Custom ops have no rule for either: tangents would be dropped without a word, and a kernel that is
called directly would read memory that the tensors of ``vmap`` do not have.
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


def _is_open() -> bool:
    """Ask torch 2.13, which keeps both in private."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None
