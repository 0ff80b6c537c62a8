"""The loop of Sirius: sparse tokens, a check by all of the model, and back to what is unlikely.

Texts of a batch are continued one after the other: each falls back to a place of its own, and a
sparse model reads little less than everything for many texts at once.

Shapes: S tokens of a prompt, N new ones, T tokens of a check, V vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.sampling import Sampling
from moezoo_models.decoding.sirius import Corrections, Sirius, step_shares, whole
from moezoo_models.model.causal_lm import MoezooForCausalLM


@torch.no_grad()
def corrected_ids(
    model: MoezooForCausalLM,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    options: Sirius,
    griffin: float | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    corrections: Corrections | None = None,
) -> Tensor:
    """Continue prompts by a sparse model whose tokens all of the model checks.

    Args:
        model: one that :func:`~moezoo_models.decoding.sirius.check_corrected` accepts.
        ids: ``(batch, S)`` int64, padded on the left.
        mask: ``(batch, S)``, nonzero at real tokens.
        config: as of :func:`~moezoo_models.decoding.loop.continue_ids`.
        options: when to check, and what passes.
        griffin: share of a dense block's neurons that a prompt keeps for the sparse model; None
            where blocks are selective themselves.
        processors: as there.
        criteria: as there, called with one text at a time.
        streamer: as there; tokens come when they have passed.
        corrections: to which is added what was found.

    Returns:
        ``(batch, S + N)`` int64, as there.
    """
    counts = Corrections() if corrections is None else corrections
    counts.step_work, counts.step_read = step_shares(model, griffin)
    sampling = Sampling(config, processors)
    continued = []
    for row, real in zip(ids, mask, strict=True):
        prompt = row[real != 0][None]
        decoder = Decoder(model, prompt, torch.ones_like(prompt), config.max_new_tokens, griffin)
        text = _Text(model, decoder, prompt, config, options, sampling, counts, criteria, streamer)
        continued.append(text.write())
    ends = pad_sequence(continued, batch_first=True, padding_value=config.pad_token_id)
    return torch.cat([ids, ends], dim=1)


class _Choice(NamedTuple):
    """What is chosen for a place.

    Attributes:
        token: ``(1,)`` int64.
        scores: ``(1, V)``, what it is chosen by.
        logits: ``(1, V)``, as processors leave them.
    """

    token: Tensor
    scores: Tensor
    logits: Tensor


class _Text:
    """One text, which grows from check to check.

    The cache holds all but the last of its tokens, as the full model computes them.
    """

    def __init__(
        self,
        model: MoezooForCausalLM,
        decoder: Decoder,
        prompt: Tensor,
        config: GenerationConfig,
        options: Sirius,
        sampling: Sampling,
        counts: Corrections,
        criteria: StoppingCriteriaList | None,
        streamer: BaseStreamer | None,
    ) -> None:
        self._model, self._decoder = model, decoder
        self._options, self._sampling, self._counts = options, sampling, counts
        self._criteria, self._streamer = criteria, streamer
        self._draws = bool(config.do_sample)
        self._begin = self._end = prompt.shape[1]
        self._limit = self._end + config.max_new_tokens
        self._ends = set(torch.tensor(config.eos_token_id).flatten().tolist())
        self._written = prompt.new_empty(1, self._limit)
        self._written[:, : self._end] = prompt
        self._running = True

    def write(self) -> Tensor:
        """Write the text to its end; return what follows the prompt, ``(N,)``."""
        if self._streamer is not None:
            self._streamer.put(self._written[:, : self._end].cpu())
        with whole(self._model):
            first = self._choose(self._end, self._decoder.prefill())
        self._append(first.token, first.scores)
        while self._running:
            noise = self._noise()
            drafted = self._draft()
            self._use(noise)
            self._check(drafted)
        if self._streamer is not None:
            self._streamer.end()
        return self._written[0, self._begin : self._end].clone()

    def _draft(self) -> int:
        """Write behind the text what the sparse model says; return how many tokens."""
        assert self._options.period is not None
        last = min(self._end + self._options.period - 1, self._limit)
        for place in range(self._end, last):
            logits = self._decoder.step(self._written[:, place - 1])
            self._counts.steps += 1
            token = self._choose(place, logits).token
            self._written[:, place] = token
            if int(token) in self._ends:
                return place + 1 - self._end
        return last - self._end

    def _check(self, drafted: int) -> None:
        """Read what was drafted by all of the model, and keep what passes.

        The first token that does not is replaced by the full model's choice; one more follows where
        all pass and the text does not end with them.
        """
        begin, counts = self._end, self._counts
        behind = begin + drafted
        ending = behind == self._limit or int(self._written[0, behind - 1]) in self._ends
        tokens = self._written[:, begin - 1 : behind - ending]
        with whole(self._model):
            logits = self._decoder.reread(tokens, begin - 1)  # (1, T, V)
        counts.checks += 1
        counts.reread += tokens.shape[1]
        drafts = self._written[0, begin:behind].clone()
        kept = 0
        for place in range(tokens.shape[1]):
            choice = self._choose(begin + place, logits[:, place])
            passes = place < drafted and self._passes(drafts[place], choice)
            token = drafts[place : place + 1] if passes else choice.token
            self._append(token, choice.scores)
            kept += passes
            if not (passes and self._running):
                break
        counts.kept += kept
        counts.dropped += drafted - kept
        counts.own += self._end - begin - kept
        self._decoder.return_to(self._end - 1)

    def _passes(self, draft: Tensor, choice: _Choice) -> bool:
        if int(draft) == int(choice.token):
            return True
        if self._options.threshold == 1:  # which a probability of nearly 1 is rounded to
            return False
        likely = (choice.logits / self._options.temperature).softmax(-1)
        return float(likely[0, draft]) >= self._options.threshold

    def _choose(self, place: int, logits: Tensor) -> _Choice:
        so_far = self._written[:, :place]
        processed = self._sampling.processed(so_far, logits)
        scores = self._sampling.shaped(so_far, processed.clone())
        return _Choice(self._sampling.choose(scores), scores, processed)

    def _append(self, token: Tensor, scores: Tensor) -> None:
        """Add a token that stays, and find out whether the text goes on."""
        self._written[:, self._end] = token
        self._end += 1
        if self._streamer is not None:
            self._streamer.put(token.cpu())
        self._running = self._end < self._limit and int(token) not in self._ends
        if self._criteria is not None:
            stopped = self._criteria(self._written[:, : self._end], scores)
            self._running = self._running and not bool(stopped.any())

    def _noise(self) -> Tensor | None:
        """Return the random state, if tokens are drawn.

        The full model draws by the numbers that the sparse one drew by: where both say nearly the
        same they draw the same, and what passes no threshold is drawn as without a sparse model.
        """
        if not self._draws:
            return None
        device = self._written.device
        if device.type == "cpu":
            return torch.get_rng_state()
        state: Tensor = torch.get_device_module(device).get_rng_state(device)
        return state

    def _use(self, noise: Tensor | None) -> None:
        if noise is None:
            return
        device = self._written.device
        if device.type == "cpu":
            torch.set_rng_state(noise)
        else:
            torch.get_device_module(device).set_rng_state(noise, device)
