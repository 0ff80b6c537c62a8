"""The continuation of prompts, token by token: greedy or sampled, until texts end.

Scores are processed and tokens drawn in the order of transformers' ``generate``, so that the same
seed draws the same tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible, turns_anew
from moezoo_models.decoding.griffin import check_decoded
from moezoo_models.decoding.stock import as_ours
from moezoo_models.model.causal_lm import MoezooForCausalLM


def continue_ids(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    *,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    griffin: float | None = None,
) -> Tensor:
    """Continue prompts: as ``model.generate`` does, by :class:`Decoder` where that can.

    A stock mixture that is one of ours by other names is decoded as ours.

    Args:
        model: in evaluation mode, on any device.
        ids: ``(batch, length)`` int64, padded on the left.
        mask: ``(batch, length)`` int64, 1 at real tokens.
        config: what :func:`moezoo_models.generate.generation_config` returned.
        processors: applied to the logits before temperature, top-k and top-p.
        criteria: end texts beside the tokens that do.
        streamer: given the prompt, then each token; for a batch of one.
        griffin: share of a dense block's neurons that the prompt keeps for what follows (GRIFFIN);
            None for all of them.

    Returns:
        ``(batch, length + new)`` int64, prompts and continuations; after its end a text has
        ``pad_token_id``.

    Raises:
        InputError: ``griffin`` is out of range, or fits neither the model nor the prompts.
    """
    new_tokens = config.max_new_tokens
    if griffin is not None:
        check_decoded(model, griffin, ids.shape[1], new_tokens)
    if griffin is None:
        model = as_ours(model) or model
    if ineligible(model) is None and not turns_anew(model.config, ids.shape[1], new_tokens):
        whole = cast("MoezooForCausalLM", model)
        steps = Decoder(whole, ids, mask, new_tokens, griffin)
        return _continue(steps, ids, config, processors, criteria, streamer)
    written: Tensor = cast(Any, model).generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=criteria,
        streamer=streamer,
    )
    return written


@torch.no_grad()
def _continue(
    decoder: Decoder,
    ids: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList | None,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Run the loop of ``generate``."""
    process: Any = LogitsProcessorList([*processors, *_warpers(config)])
    (batch, length), new = ids.shape, config.max_new_tokens
    written = ids.new_empty(batch, length + new)
    written[:, :length] = ids
    ends = torch.tensor(config.eos_token_id, device=ids.device)
    running = torch.ones(batch, dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    logits = decoder.prefill()
    for end in range(length + 1, length + new + 1):
        # A processor may write into the scores.
        scores = process(written[:, : end - 1], logits.to(torch.float32, copy=True))
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = torch.where(running, tokens, config.pad_token_id)
        written[:, end - 1] = tokens
        if streamer is not None:
            streamer.put(tokens.cpu())
        running &= torch.isin(tokens, ends, invert=True)
        if criteria is not None:
            running &= ~criteria(written[:, :end], scores)
        if end == length + new or not running.any():
            break
        logits = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    return written[:, :end].clone()


def _warpers(config: GenerationConfig) -> LogitsProcessorList:
    """List what shapes the distribution that is sampled, in the order of ``generate``."""
    warpers = LogitsProcessorList()
    if not config.do_sample:
        return warpers
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers
