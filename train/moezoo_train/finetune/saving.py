"""Model directories of runs that train a part: everything, with what was added merged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.checkpoints.finite import check_finite
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.finetune.lora import merged_state, save_adapters
from moezoo_train.finetune.neurons import whole_state


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    state_dict: dict[str, Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write a model as a directory that loads as any other; its adapters alone go beside it.

    Args:
        path: the directory, as for :func:`save_checkpoint`; adapters go to ``adapter`` beside it.
        model: with or without adapters or slices of neurons; all processes that keep parts of it
            must call this.
        tokenizer: written along.
        state_dict: its whole tensors, if processes keep parts.
        write: whether this process is to write.
    """
    if hasattr(model, "adapted_weights"):
        merged = merged_state(model, state_dict, write)
        if write:
            check_finite(merged.items(), path)  # before the adapters take their place
            save_adapters(path.with_name("adapter"), model, state_dict)
        state_dict = merged
    elif hasattr(model, "sliced_weights"):
        state_dict = whole_state(model)
    if write:
        save_checkpoint(path, model, tokenizer, state_dict=state_dict)
