"""What goes wrong in a command, in the one line that a user reads.

Beside our own :class:`~moezoo.errors.InputError` these are a library's refusal of a setting, what
the machine lacks, and what is not installed. All else is a bug, whose traceback stays.
"""

from __future__ import annotations

import argparse
import errno

from moezoo.errors import InputError

# Top-level modules of the optional dependencies, and the extra that brings each.
EXTRAS = {
    "lightning": "train",
    "jsonargparse": "train",
    "docstring_parser": "train",
    "transformers": "train",
    "sentencepiece": "train",
    "torchmetrics": "train",
    "rich": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "pyarrow": "data",
    "datasets": "data",
    "wandb": "wandb",
    "peft": "lora",
    "lm_eval": "eval",
    "gguf": "gguf",
    "deepspeed": "deepspeed",
    "xformers": "xformers",
    "triton": "gpu",
}
# Packages whose ValueErrors are about settings: Lightning's trainer, MOEZOO_BACKEND, and tasks.
REFUSING = ("lightning", "moezoo_kernels", "lm_eval")

# What to do about errors of the system.
_OS_FIXES = {
    errno.ENOSPC: "; free space there, or write to another disk",
    errno.EDQUOT: "; free space there, or write to another disk",
    errno.EFBIG: "; raise the limit (ulimit -f), or write to another disk",
    errno.EACCES: "; change its permissions, or name another",
    errno.EROFS: "; name a place that can be written",
    errno.ENOENT: "; name one that is there",
    errno.ENAMETOOLONG: "; name a shorter one",
}


def explain(error: Exception) -> str | None:
    """Return one line for a user's mistake, or what the machine lacks; None for anything else."""
    from moezoo.command.messages import one_line, render  # not above: they take time to import

    if isinstance(error, InputError):
        return one_line(str(error))
    if isinstance(error, argparse.ArgumentError):
        return render(str(error))
    if isinstance(error, OSError):
        return _explain_os(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return f"{package} is not installed; run: pip install 'moezoo[{EXTRAS[package]}]'"
    if type(error).__name__ == "MisconfigurationException" or _is_refusal(error):
        return one_line(str(error))
    return None


def _is_refusal(error: Exception) -> bool:
    """Return whether a library whose settings the user chooses raised this, to refuse one."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return isinstance(error, ValueError) and module.partition(".")[0] in REFUSING


def _explain_os(error: OSError) -> str:
    from moezoo.command.messages import one_line

    reason = (error.strerror or "").lower()
    if not reason:
        return one_line(str(error))
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{reason}{_OS_FIXES.get(error.errno or 0, '')}"
