"""What enters a decoder: token ids, positions and embeddings, checked and scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.errors import InputError
from moezoo_models.model.config import MoezooConfig


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        InputError: names the id and the vocabulary's size.
    """
    if not token_ids.numel():
        return
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"input_ids: token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )


def check_positions(position_ids: Tensor, longest: int) -> None:
    """Refuse positions for which no embedding was learned.

    Raises:
        InputError: names the position, and how many there are.
    """
    if position_ids.numel() and (last := int(position_ids.max())) >= longest:
        raise InputError(
            f"position_ids: position {last} is beyond the {longest} that were learned "
            "(max_position_embeddings); give shorter texts"
        )


def scaled_embeddings(embedded: Tensor, config: MoezooConfig) -> Tensor:
    """Multiply embeddings of tokens by the model's factor, rounded to their dtype as Gemma does."""
    if config.embedding_multiplier == 1.0:
        return embedded
    factor = config.embedding_multiplier
    return embedded * torch.tensor(factor, device=embedded.device).to(embedded.dtype)
