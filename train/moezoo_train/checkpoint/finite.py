"""A run whose numbers are no longer finite replaces no checkpoint of the time when they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo_models.checkpoints.finite import first_not_finite
from moezoo_train.parallel.distributed import gather_from_ranks
from moezoo_train.parallel.sharded_checkpoints import checkpoint_tensors
from moezoo_train.parallel.state_dicts import local_shard


def check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose model or optimizer is not finite; all processes must call this.

    Args:
        checkpoint: as Lightning makes it; its tensors may be sharded.

    Raises:
        InputError: on all processes alike; names the tensor.
    """
    tensors = ((name, on[key]) for name, _, on, key in checkpoint_tensors(checkpoint))
    _check(tensors, checkpoint["global_step"])


def check_model(model: nn.Module, step: int) -> None:
    """Refuse a model that is not finite; all processes must call this.

    Args:
        model: whose parameters may be sharded; each process looks at its shards.
        step: after which it is what it is.

    Raises:
        InputError: on all processes alike; names the tensor.
    """
    _check(model.state_dict(keep_vars=True).items(), step)


def _check(tensors: Iterable[tuple[str, Any]], step: int) -> None:
    own = ((name, local_shard(value)) for name, value in tensors if isinstance(value, Tensor))
    found = [name for name in gather_from_ranks(first_not_finite(own)) if name is not None]
    if found:
        raise InputError(
            f"model: after step {step} '{found[0]}' holds NaN or an infinity; nothing of it is "
            "written, and what was written before stays: go on from there (--ckpt_path last) with "
            "a lower trainer.gradient_clip_val, or begin anew with a lower optimizer.lr"
        )
