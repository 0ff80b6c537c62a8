"""Whether a model knows what a sentence goes on with: each answer's tokens, taken greedily."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moezoo_models.mode import evaluating
from moezoo_models.model.head import IGNORED
from moezoo_models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """What a model makes of one answer.

    Attributes:
        right: whether it says it by taking the likeliest token each time.
        nats: of its tokens together.
        tokens: their number.
    """

    right: bool
    nats: float
    tokens: int


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sentences: Iterable[tuple[str, str]],
    batch_size: int = 64,
) -> list[Answer]:
    """Ask a model for the ends of sentences.

    Each stands alone, behind the token that ends documents.

    Args:
        model: a causal language model, ours or a stock one; left in the mode it was in.
        tokenizer: its tokenizer.
        sentences: pairs of a question and the sentence that begins with it; what follows there is
            the answer.
        batch_size: sentences computed at once.

    Returns:
        What it makes of each, in their order.
    """
    rows = [encode_question(tokenizer, *pair) for pair in sentences]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    found: dict[int, Answer] = {}
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            some = order[start : start + batch_size]
            ids, labels = _pad([rows[row] for row in some], tokenizer.eos_id)
            ids, labels = ids.to(model.device), labels.to(model.device)
            real = torch.arange(ids.shape[1], device=ids.device) < _lengths(labels)[:, None]
            logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
            scored = labels != IGNORED
            right = ((logits.argmax(-1) == labels) | ~scored).all(-1)
            nats = torch.zeros(labels.shape, device=labels.device)
            nats[scored] = F.cross_entropy(logits[scored].float(), labels[scored], reduction="none")
            figures = zip(
                right.tolist(), nats.sum(-1).tolist(), scored.sum(-1).tolist(), strict=True
            )
            found |= {row: Answer(*each) for row, each in zip(some, figures, strict=True)}
    return [found[row] for row in range(len(rows))]


def encode_question(tokenizer: Tokenizer, question: str, sentence: str) -> tuple[list[int], int]:
    """Return the tokens of a document that is one sentence, and where in them the answer begins."""
    whole, asked = tokenizer.encode(sentence), tokenizer.encode(question)
    # A tokenizer may cut the end of the question otherwise where the sentence goes on.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(whole, asked, strict=False))
    start = sum(1 for _ in same)
    return [tokenizer.eos_id, *whole], start + 1


def _pad(rows: Sequence[tuple[list[int], int]], filling: int) -> tuple[Tensor, Tensor]:
    """Return ids and, at each position, the next token if it belongs to the answer: ``(B, S)``."""
    shape = (len(rows), max(len(ids) for ids, _ in rows) - 1)
    input_ids, labels = torch.full(shape, filling), torch.full(shape, IGNORED)
    for row, (ids, start) in enumerate(rows):
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return input_ids, labels


def _lengths(labels: Tensor) -> Tensor:
    """Return the number of tokens before padding: answers end their rows."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED) * positions).amax(-1)
