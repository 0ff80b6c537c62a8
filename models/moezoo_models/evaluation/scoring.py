"""A model's window, and its logits from hidden states, for every evaluation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo_models.model.config import check_trained_length
from moezoo_models.model.head import shaped_logits

_LONGEST_DEFAULT = 2048


def window_length(model: PreTrainedModel, sequence_length: int | None) -> int:
    """Return the tokens that a model sees at once: as asked, or what it was trained on.

    Where that is not known, what it is made for. The default is at most 2048.

    Raises:
        InputError: the length asked for is out of range or more than the model is made for, or
            its configuration's ``trained_length`` is.
    """
    longest = model.config.max_position_embeddings
    if sequence_length is None:
        trained = check_trained_length(getattr(model.config, "trained_length", None), longest)
        return min(trained or longest, _LONGEST_DEFAULT)
    if check_int("sequence_length", sequence_length) > longest:
        raise InputError(
            f"sequence_length: {sequence_length:,} is more than the {longest:,} tokens that the "
            f"model is made for (max_position_embeddings); give at most {longest}"
        )
    return sequence_length


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn last hidden states ``(..., hidden_size)`` into logits ``(..., vocab_size)`` in fp32."""
    whole: Any = model
    return shaped_logits(whole.lm_head(hidden).float(), model.config)
