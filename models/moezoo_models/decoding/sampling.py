"""From logits to tokens: the likeliest, or drawn as transformers' ``generate`` draws them.

Shapes: B texts, S tokens so far, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Sampling:
    """The choice of a next token, in the order of ``generate``.

    Args:
        config: whether to sample, temperature, top-k and top-p.
        processors: applied to the logits before these.
    """

    def __init__(self, config: GenerationConfig, processors: LogitsProcessorList) -> None:
        self._draws = bool(config.do_sample)
        self._processors: Any = processors
        self._warpers: Any = _warpers(config)

    def processed(self, written: Tensor, logits: Tensor) -> Tensor:
        """Return logits in fp32 as the processors leave them, ``(B, V)``.

        Args:
            written: ``(B, S)`` int64.
            logits: ``(B, V)``, which stay as they are.
        """
        return self._processors(written, logits.to(torch.float32, copy=True))

    def shaped(self, written: Tensor, processed: Tensor) -> Tensor:
        """Return the scores that tokens are drawn by, ``(B, V)``; a warper may write into these."""
        return self._warpers(written, processed)

    def choose(self, scores: Tensor) -> Tensor:
        """Return a token of each text, ``(B,)`` int64."""
        if self._draws:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)


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
