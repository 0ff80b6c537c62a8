"""Model options of a single row, and what a block with them costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moezoo.arguments import as_argument
from moezoo.errors import InputError, check_choice
from moezoo.feed_forward import FeedForward
from moezoo_train.experiments.common.options import ModelOptions
from moezoo_train.measure.throughput import forward_flops_per_token
from moezoo_train.run.module import LanguageModel

OPTIONS = ("attention_experts", "latent_attention", "num_kv_heads", "parallel", "qk_norm")
"""What a row may set: options of blocks beside their feed-forward layer."""


def model_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's model options as arguments of :class:`LanguageModel`.

    Raises:
        InputError: one is not a row's to set, or its own options are unknown or out of range.
    """
    found = {}
    for name, value in options.items():
        check_choice("model", name, OPTIONS)
        try:
            found[name] = as_argument(LanguageModel, name, value)
        except InputError as error:
            raise InputError(f"model.{error}") from error
    return found


def block_flops(
    size: ModelOptions, sequence_length: int, options: Mapping[str, Any]
) -> Callable[[FeedForward], int]:
    """Return what counts the forward FLOPs per token of a block that has a layer, attention too.

    Args:
        size: of the model.
        sequence_length: that a token sees.
        options: the row's.

    Raises:
        InputError: as :func:`model_arguments`; of what is returned, no such model can be built.
    """
    arguments, vocabulary = model_arguments(options), 2

    def count(layer: FeedForward) -> int:
        try:
            with torch.device("meta"):
                model = LanguageModel(
                    vocab_size=vocabulary,
                    d_model=size.d_model,
                    num_layers=1,
                    num_heads=size.num_heads,
                    max_length=sequence_length,
                    ffn=lambda d_model: layer,
                    allow_non_causal=True,
                    **arguments,
                ).model
        except InputError as error:
            raise InputError(f"model.{error}") from error
        return forward_flops_per_token(model, sequence_length) - 2 * vocabulary * size.d_model

    return count
