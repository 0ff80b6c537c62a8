"""Writing text with a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from moezoo.errors import InputError, check_int, check_text
from moezoo_models.chatting import Chat, OnText, talk
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.decoding.griffin import check_decoded
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.settings import (
    FiniteLogits,
    check_sampling,
    generation_config,
    new_tokens,
    own_settings,
    prompt_ids,
    start_of,
)
from moezoo_models.decoding.sirius import Corrections, Sirius, check_corrected
from moezoo_models.decoding.streamer import WholeCharacterStreamer
from moezoo_models.devices import pick_device
from moezoo_models.mode import evaluating
from moezoo_models.text.tokenizer import Tokenizer

__all__ = [
    "FiniteLogits",
    "WholeCharacterStreamer",
    "check_sampling",
    "continue_text",
    "generate",
    "generation_config",
    "new_tokens",
    "own_settings",
    "prompt_ids",
]


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = True,
    device: str = "auto",
    attention: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    griffin: float | None = None,
    sirius: Sirius = Sirius(),  # noqa: B008 - frozen
    chat: bool = False,
    system: str = "",
) -> str:
    """Continue a prompt with a checkpoint's model, or answer it.

    The same checkpoint, prompt, options and seed give the same text on the same machine.

    Args:
        checkpoint: directory of a checkpoint: ours, or one that moezoo upcycle or
            carve read or write.
        prompt: text to continue; empty to begin a new one.
        max_new_tokens: stop after that many tokens, if the model does not end the text before;
            default: 128, or what the model is made for beside the prompt.
        temperature: divides the logits before sampling; 0 always takes the likeliest token.
        top_k: sample among that many likeliest tokens only; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        stream: print prompt and text as it comes; if false, print nothing.
        device: cpu, cuda, cuda:1, ..., or auto for an accelerator if there is one.
        attention: attention backend: eager, sdpa, flex_attention, flash_attention_2 or xformers.
        tokenizer: directory of the tokenizer; default: the checkpoint's own.
        dtype: of the weights: float32, bfloat16, float16, or auto: as saved, but float32 on a CPU
            that is slow in that.
        griffin: share of each dense block's neurons that go on after the prompt: those that it
            used most (GRIFFIN, arXiv:2404.01365); default: all of them.
        sirius: checks by all of the model of what a part of it wrote (arXiv:2409.03856),
            after moezoo sparsify or with griffin; figures are printed last.
        chat: answer the prompt as the tokenizer's chat template has it, or, without a prompt, line
            after line of the standard input, each knowing those before.
        system: with chat, what the model is told beforehand; default: what the template says.

    Returns:
        The prompt and its continuation; with chat the last answer.

    Raises:
        InputError: the checkpoint cannot be loaded, or an option is out of range.
    """
    check_sampling(temperature, top_k, top_p, seed)
    if max_new_tokens is not None:
        check_int("max_new_tokens", max_new_tokens)
    check_text("prompt", prompt)
    if system and not chat:
        raise InputError("system: only conversations have one; add --chat")
    found = sirius.counts()
    place = pick_device(device)
    model, words = load_any_with_tokenizer(checkpoint, tokenizer, place, attention, dtype)
    if chat:

        def answer(prompt: Sequence[int], ends: Sequence[int], on_text: OnText | None) -> str:
            ids, count = start_of(model, prompt, max_new_tokens)
            config = generation_config(model, words, count, temperature, top_k, top_p)
            config.eos_token_id = sorted({*config.eos_token_id, *ends})
            return _continue(model, words, ids, config, seed, on_text, griffin, sirius, found)

        said = talk(Chat(answer, words, system), prompt, stream)
        _report(found, stream)
        return said
    # Options that do not fit this model are refused before the prompt is printed.
    ids, count = start_of(model, prompt_ids(words, prompt), max_new_tokens)
    if griffin is not None:
        check_decoded(model, griffin, ids.shape[1], count)
    if found is not None:
        check_corrected(model, sirius, griffin, ids.shape[1], count)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if stream:
        show(prompt)
    continuation = continue_text(
        model,
        words,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=show if stream else None,
        griffin=griffin,
        sirius=sirius,
        corrections=found,
    )
    if stream:
        show("\n")
    _report(found, stream)
    return prompt + continuation


def _report(found: Corrections | None, stream: bool) -> None:
    if found is not None and stream:
        print(found.line(), file=sys.stderr)


def continue_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    griffin: float | None = None,
    sirius: Sirius = Sirius(),  # noqa: B008 - frozen
    corrections: Corrections | None = None,
) -> str:
    """Continue a prompt with a model in memory; it stays in the mode and random state it was in.

    Args:
        model: the model, on any device.
        tokenizer: its tokenizer.
        prompt: text to continue; empty to begin a new one.
        max_new_tokens: as for :func:`generate`.
        temperature: as there.
        top_k: as there.
        top_p: as there.
        seed: as there.
        on_text: called with each piece of text as soon as its characters are whole.
        griffin: as for :func:`generate`.
        sirius: as there.
        corrections: to which is added what its checks find.

    Returns:
        The continuation, without the prompt.

    Raises:
        InputError: an option is out of range, or the tokenizer is not the model's.
    """
    check_sampling(temperature, top_k, top_p, seed)
    ids, count = start_of(
        model, prompt_ids(tokenizer, check_text("prompt", prompt)), max_new_tokens
    )
    config = generation_config(model, tokenizer, count, float(temperature), top_k, float(top_p))
    return _continue(model, tokenizer, ids, config, seed, on_text, griffin, sirius, corrections)


def _continue(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: Tensor,
    config: GenerationConfig,
    seed: int,
    on_text: OnText | None,
    griffin: float | None,
    sirius: Sirius,
    corrections: Corrections | None,
) -> str:
    """Return the text that follows ids, ``(1, length)``."""
    pieces: list[str] = []

    def collect(piece: str) -> None:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model), own_settings(model):
        torch.manual_seed(seed)
        continue_ids(
            model,
            ids.to(model.device),
            torch.ones_like(ids, device=model.device),
            config,
            processors=LogitsProcessorList([FiniteLogits()]),
            streamer=WholeCharacterStreamer(tokenizer, collect),
            griffin=griffin,
            sirius=sirius,
            corrections=corrections,
        )
    return "".join(pieces)
