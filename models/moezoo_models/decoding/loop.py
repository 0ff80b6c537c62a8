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
)
from transformers.generation.streamers import BaseStreamer

from moezoo_models.decoding.correcting import corrected_ids
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible, turns_anew
from moezoo_models.decoding.griffin import check_decoded
from moezoo_models.decoding.sampling import Sampling
from moezoo_models.decoding.sirius import (
    UNCHECKED,
    Corrections,
    Sirius,
    check_corrected,
)
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
    sirius: Sirius = UNCHECKED,
    corrections: Corrections | None = None,
) -> Tensor:
    """Continue prompts: as ``model.generate`` does, by :class:`Decoder` where that can.

    A stock mixture that is one of ours by other names is decoded as ours.

    Args:
        model: in evaluation mode, on any device.
        ids: ``(batch, length)`` int64, padded on the left.
        mask: ``(batch, length)`` int64, 1 at real tokens.
        config: what :func:`moezoo_models.decoding.settings.generation_config` returned.
        processors: applied to the logits before temperature, top-k and top-p.
        criteria: end texts beside the tokens that do.
        streamer: given the prompt, then each token; for a batch of one.
        griffin: share of a dense block's neurons that the prompt keeps for what follows (GRIFFIN);
            None for all of them.
        sirius: checks of what was decoded by all of the model; by default there are none. With
            them the texts of a batch are continued one after the other.
        corrections: to which is added what the checks found.

    Returns:
        ``(batch, length + new)`` int64, prompts and continuations; after its end a text has
        ``pad_token_id``.

    Raises:
        InputError: ``griffin`` or ``sirius`` is out of range, or does not fit the model or the
            prompts.
    """
    new_tokens = config.max_new_tokens
    if sirius != UNCHECKED:
        for length in mask.sum(-1).tolist():
            check_corrected(model, sirius, griffin, length, new_tokens)
        whole = cast("MoezooForCausalLM", model)
        given = (processors, criteria, streamer, corrections)
        return corrected_ids(whole, ids, mask, config, sirius, griffin, *given)
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
    sampling = Sampling(config, processors)
    (batch, length), new = ids.shape, config.max_new_tokens
    written = ids.new_empty(batch, length + new)
    written[:, :length] = ids
    # Without an end none of them is a token.
    ends = torch.tensor(config.eos_token_id or [-1], device=ids.device)
    running = torch.ones(batch, dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    logits = decoder.prefill()
    for end in range(length + 1, length + new + 1):
        so_far = written[:, : end - 1]
        scores = sampling.shaped(so_far, sampling.processed(so_far, logits))
        tokens = torch.where(running, sampling.choose(scores), config.pad_token_id)
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
