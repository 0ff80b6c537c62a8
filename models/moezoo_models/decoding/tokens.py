"""The continuation of token ids in Python, for a model that is in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.settings import check_sampling, own_settings
from moezoo_models.mode import evaluating
from moezoo_models.model.inputs import check_token_ids


def continue_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
) -> Tensor:
    """Continue prompts by the tokens of ``model.generate``, decoded by the steps of this library.

    They decode our models, and those of transformers' mixtures that are ours by other names; any
    other model's own ``generate`` does it. Sampling draws from torch's random state. Nothing is
    taken from the model's ``generation_config``.

    Args:
        model: a causal language model, on any device; it is run in evaluation mode and left in the
            one it was in.
        input_ids: ``(B, S)`` int64, padded on the left.
        attention_mask: ``(B, S)``, nonzero at real tokens; None if all are.
        max_new_tokens: at most so many are added.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among that many likeliest tokens only; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability.
        eos_token_id: tokens that end a text; None for none.
        pad_token_id: what follows the end of a text, while others go on.

    Returns:
        ``(B, S + new)`` int64: prompts and what follows them.

    Raises:
        InputError: shapes do not fit, or an option or a token id is out of range.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise InputError(f"input_ids: shape {tuple(input_ids.shape)}; give (batch, at least 1)")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask: shape {tuple(mask.shape)} does not match input_ids' "
            f"{tuple(input_ids.shape)}"
        )
    if not mask[:, -1].all():
        raise InputError("attention_mask: a prompt ends with padding; pad on the left")
    check_int("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    vocabulary = model.config.get_text_config().vocab_size
    check_token_ids(input_ids, vocabulary)
    if eos_token_id is None:
        ends = []
    else:
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    sampled = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id,
        **(sampled if temperature > 0 else {}),
    )
    with torch.no_grad(), evaluating(model), own_settings(model):
        ids, mask = input_ids.to(model.device), mask.to(model.device)
        return continue_ids(model, ids, mask, config, processors=LogitsProcessorList())
