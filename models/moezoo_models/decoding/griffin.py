"""Dense blocks that keep, after a prompt, only the neurons that the prompt uses most (GRIFFIN).

Dong et al. 2024, arXiv:2404.01365: while the prompt is read, all neurons are computed; what follows
has the share of them with the largest statistic (:mod:`moezoo.convert.select.prompt`). The choice
belongs to one sequence. It is kept by whoever decodes or scores that sequence, never by a layer or
a checkpoint.

Shapes: B sequences, S tokens, F neurons, K of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moezoo.convert.select.prompt import kept_count, prompt_neurons
from moezoo.errors import InputError
from moezoo.layers.dense import DenseFFN
from moezoo_models.decoding.eligible import ineligible, turns_anew
from moezoo_models.model.causal_lm import MoezooForCausalLM

Chosen = dict[int, Tensor]
"""The neurons ``(K,)`` int64 that each block keeps, by the block's number."""


def dense_blocks(model: PreTrainedModel, share: float) -> dict[int, DenseFFN]:
    """Return the blocks whose neurons a prompt chooses among, by number.

    Args:
        model: the model.
        share: of the neurons to keep, in (0, 1].

    Raises:
        InputError: the share is out of range, or the model has no dense block of ours.
    """
    kept_count(1, share)
    if not isinstance(model, MoezooForCausalLM):
        raise InputError(
            f"griffin: {type(model).__name__} is computed by transformers, and only dense blocks "
            "of our own model are chosen from; leave it out"
        )
    blocks = enumerate(model.model.blocks())
    found = {number: block.mlp for number, block in blocks if type(block.mlp) is DenseFFN}
    if not found:
        raise InputError("griffin: the model has no dense feed-forward block; leave it out")
    return found


def check_decoded(model: PreTrainedModel, share: float, length: int, new_tokens: int) -> None:
    """Raise :class:`~moezoo.InputError` if no text can be continued with neurons of its prompt.

    Args:
        model: the model.
        share: of the neurons to keep.
        length: tokens of the prompt.
        new_tokens: at most so many follow.
    """
    dense_blocks(model, share)
    why = ineligible(model)
    if why is None and turns_anew(model.config, length, new_tokens):
        why = "longrope turns all keys anew at the length that the text grows past"
    if why is not None:
        raise InputError(
            f"griffin: {why}, and only our own decoding keeps a prompt's neurons; leave it out"
        )


def one_prompt(ids: Tensor, mask: Tensor) -> None:
    """Raise :class:`~moezoo.InputError` if the prompts of a batch are not all the same.

    Args:
        ids: ``(B, S)`` int64.
        mask: ``(B, S)``, nonzero at real tokens.
    """
    if not bool((ids == ids[:1]).all() and (mask == mask[:1]).all()):
        raise InputError(
            "griffin: each prompt keeps neurons of its own, and this batch has different prompts; "
            "continue one at a time"
        )


@contextmanager
def reading_prompt(model: PreTrainedModel, share: float, mask: Tensor) -> Iterator[Chosen]:
    """Choose neurons by the prompt that the model reads inside the block.

    Args:
        model: the model, which is called once.
        share: of the neurons to keep.
        mask: ``(B, S)``, nonzero at the prompt's tokens; all rows are the same prompt.

    Yields:
        What is filled by that call.

    Raises:
        InputError: as :func:`dense_blocks`.
    """
    chosen: Chosen = {}

    def look(number: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        chosen[number] = prompt_neurons(inputs[0][0][mask[0] != 0], share)

    with _watching(dense_blocks(model, share), look):
        yield chosen


@contextmanager
def kept_after(model: PreTrainedModel, share: float, prompts: Sequence[int]) -> Iterator[None]:
    """Within the block, make calls of the model compute what GRIFFIN computes after prompts.

    Each row's first tokens are its prompt and are computed with all neurons, the later ones with
    those that the prompt keeps, as if they had been fed one after the other.

    Args:
        model: the model.
        share: of the neurons to keep.
        prompts: tokens of each row's prompt, at least one.

    Raises:
        InputError: as :func:`dense_blocks`.
    """

    def cut(number: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        rows = []
        for hidden_SF, length in zip(inputs[0], prompts, strict=True):
            dropped_F = torch.ones_like(hidden_SF[0], dtype=torch.bool)
            dropped_F[prompt_neurons(hidden_SF[:length], share)] = False
            later = hidden_SF[length:].masked_fill(dropped_F, 0.0)
            rows.append(torch.cat([hidden_SF[:length], later]))
        return (torch.stack(rows),)

    with _watching(dense_blocks(model, share), cut):
        yield


@contextmanager
def _watching(blocks: dict[int, DenseFFN], call: Any) -> Iterator[None]:
    """Hand the hidden activations of every block to a function, which may return others."""
    handles = [
        block.down_proj.register_forward_pre_hook(partial(call, number))
        for number, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
