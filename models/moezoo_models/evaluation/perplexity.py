"""Loss, perplexity and bits per byte of a text, each token predicted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo_models.decoding.griffin import dense_blocks, kept_after
from moezoo_models.evaluation.scoring import logits_of, window_length
from moezoo_models.mode import evaluating
from moezoo_models.model.inputs import check_token_ids
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy in nats per token, of logits in fp32 summed in fp64.
        perplexity: ``exp(loss)``.
        bits_per_byte: total cross-entropy in bits over the bytes of the text in UTF-8, which
            compares models with different tokenizers.
        tokens: number of tokens, each of which was predicted once.
        bytes: length of the text in bytes.
        sequence_length: tokens that the model saw at once.
        stride: tokens by which the window moved.
        griffin: share of dense blocks' neurons that each window's prompt kept; None for all.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    sequence_length: int
    stride: int
    griffin: float | None = None

    def table(self) -> str:
        """Return the figures as a table, a line each."""
        rows = [
            ("loss (nats/token)", f"{self.loss:.4f}"),
            ("perplexity", f"{self.perplexity:,.3f}"),
            ("bits per byte", f"{self.bits_per_byte:.4f}"),
            ("tokens", f"{self.tokens:,}"),
            ("bytes", f"{self.bytes:,}"),
            ("window, stride (tokens)", f"{self.sequence_length:,}, {self.stride:,}"),
        ]
        if self.griffin is not None:
            rows.append(("neurons kept (GRIFFIN)", f"{self.griffin:.1%}"))
        return "\n".join(f"{name:<24}{value:>14}" for name, value in rows)


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    griffin: float | None = None,
) -> Evaluation:
    """Evaluate a model in memory on a text; see :func:`evaluate`.

    Args:
        model: ours or a stock one, on any device; it stays in the mode it was in.
        tokenizer: the model's.
        text: of any length. It stands behind the token that its tokenizer puts before texts,
            or else the one that ends them.
        sequence_length: tokens that the model sees at once; default: what it was trained on, or
            what it is made for; at most 2048.
        stride: tokens by which the window moves; default: half of ``sequence_length``.
        batch_size: windows computed at once.
        griffin: share of dense blocks' neurons that stay after a window's prompt, as in decoding:
            the prompt is what other windows predict, in the first one its first half; None for all.

    Raises:
        InputError: the text is empty, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    return evaluate_tokens(
        model,
        encode_text(tokenizer, text),
        start_token=tokenizer.start_id,
        num_bytes=len(text.encode("utf-8")),
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        griffin=griffin,
    )


@torch.no_grad()
def evaluate_tokens(
    model: PreTrainedModel,
    tokens: Sequence[int] | Tensor,
    *,
    start_token: int,
    num_bytes: int,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    griffin: float | None = None,
) -> Evaluation:
    """Evaluate a model in memory on tokens; see :func:`evaluate`.

    Args:
        model: the model, on any device; it stays in the mode it was in.
        tokens: ``(T,)``, ids of the text's tokens.
        start_token: id that stands before the first, which is predicted from it.
        num_bytes: length of the text in UTF-8, in bytes.
        sequence_length: as for :func:`evaluate_text`.
        stride: as there.
        batch_size: as there.
        griffin: as there.

    Raises:
        InputError: there are no tokens, an option is out of range, or a token id is outside the
            model's vocabulary.
    """
    stream = torch.cat([torch.tensor([start_token]), torch.as_tensor(tokens).long().cpu()])
    num_tokens = len(stream) - 1
    if not num_tokens:
        raise InputError("text: it has no tokens; give a text that is not empty")
    check_token_ids(stream, model.config.vocab_size)
    length = window_length(model, sequence_length)
    step = max(length // 2, 1) if stride is None else check_int("stride", stride, maximum=length)
    check_int("batch_size", batch_size)
    if griffin is not None:
        dense_blocks(model, griffin)
        if step == length:
            raise InputError(
                f"griffin: windows of {length} tokens that move by {step} have no prompt to choose "
                "neurons by; lower the stride"
            )

    windows = _windows(num_tokens, length, step)
    batches = (windows[i : i + batch_size] for i in range(0, len(windows), batch_size))
    with evaluating(model):
        losses = (_losses(model, stream, batch, griffin) for batch in batches)
        nats = math.fsum(loss for batch in losses for loss in batch)
    check_loss(nats)
    loss = nats / num_tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens=num_tokens,
        bytes=num_bytes,
        sequence_length=length,
        stride=step,
        griffin=griffin,
    )


def check_loss(nats: float) -> None:
    """Refuse a loss that is no number, which no perplexity follows from.

    Raises:
        InputError: it is NaN or infinite.
    """
    if not math.isfinite(nats):
        raise InputError(
            "checkpoint: the model's loss is not a finite number: its weights are too large for "
            "their dtype, or damaged; give another checkpoint"
        )


Window = tuple[int, int, int]
"""First position of the input, one past its last, and the first position that counts."""


def _windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Cover the positions 0 … num_tokens - 1, each counting once, by windows of one length."""
    end = min(length, num_tokens)
    windows = [(0, end, 0)]
    while end < num_tokens:
        counted, end = end, min(end + stride, num_tokens)
        windows.append((end - length, end, counted))
    return windows


def _losses(
    model: PreTrainedModel, stream: Tensor, windows: list[Window], griffin: float | None
) -> list[float]:
    """Return the nats of each window's positions that count; logits are made for those only."""
    inputs = torch.stack([stream[begin:end] for begin, end, _ in windows]).to(model.device)
    whole: Any = model
    prompts = [max(counted - begin or (end - begin) // 2, 1) for begin, end, counted in windows]
    kept = nullcontext() if griffin is None else kept_after(model, griffin, prompts)
    with kept:
        hidden = whole.model(input_ids=inputs, use_cache=False).last_hidden_state
    losses = []
    for row, (begin, end, counted) in zip(hidden, windows, strict=True):
        logits = logits_of(model, row[counted - begin :])
        targets = stream[counted + 1 : end + 1].to(logits.device)
        nats = F.cross_entropy(logits, targets, reduction="none").double().sum()
        losses.append(float(nats))
    return losses
