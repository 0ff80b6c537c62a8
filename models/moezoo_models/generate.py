"""Writing text with a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from moezoo.errors import InputError, check_int, check_number, check_text
from moezoo_models.chatting import Chat, OnText, talk
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.decoding.griffin import check_decoded
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.sirius import Corrections, Sirius, check_corrected
from moezoo_models.devices import free_memory, pick_device
from moezoo_models.mode import evaluating
from moezoo_models.model.inputs import check_token_ids
from moezoo_models.model.latent_options import cached_numbers
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import Tokenizer

_LARGEST_SEED = (1 << 63) - 1
_LEAST_TEMPERATURE = 1e-6
_NEW_TOKENS = 128
_BROKEN_CHARACTER = "\N{REPLACEMENT CHARACTER}"


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
            ids, count = _start(model, prompt, max_new_tokens)
            config = generation_config(model, words, count, temperature, top_k, top_p)
            config.eos_token_id = sorted({*config.eos_token_id, *ends})
            return _continue(model, words, ids, config, seed, on_text, griffin, sirius, found)

        said = talk(Chat(answer, words, system), prompt, stream)
        _report(found, stream)
        return said
    # Options that do not fit this model are refused before the prompt is printed.
    ids, count = _start(model, prompt_ids(words, prompt), max_new_tokens)
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
    ids, count = _start(model, prompt_ids(tokenizer, check_text("prompt", prompt)), max_new_tokens)
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


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are no numbers, of which the first token would be the likeliest."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the logits as they are.

        Raises:
            InputError: one is NaN or infinite.
        """
        if not scores.isfinite().all():
            raise InputError(
                "checkpoint: the model's logits are not finite numbers: its weights are too large "
                "for their dtype, or damaged; give another checkpoint"
            )
        return scores


@contextmanager
def own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model's ``generation_config.json`` out of what is generated inside the block.

    transformers takes from there all that options leave open, such as penalties, beams and caches,
    and would continue otherwise than the options say.
    """
    settings: Any = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = settings


def _check_memory(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Refuse a continuation whose keys and values would not fit into memory."""
    config: Any = model.config
    of_token = config.num_hidden_layers * cached_numbers(config) * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = free_memory()
    if (needed := (prompt + new) * of_token) > free:
        raise InputError(
            f"max_new_tokens: keys and values of {prompt + new:,} tokens need "
            f"{needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; lower it"
        )


class WholeCharacterStreamer(BaseStreamer):
    """Turns tokens into text as they come, holding bytes back until they make whole characters.

    Tokens are decoded together with those before them, as a tokenizer may write a token otherwise
    at the beginning of a text.

    Args:
        tokenizer: decodes the tokens.
        on_text: called with each piece of text; never with the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._context = 0
        self._written: int | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, then each new one."""
        self._ids.extend(value.flatten().tolist())
        if self._written is None:
            self._written = len(self._ids)
        else:
            self._write(final=False)

    def end(self) -> None:
        """Write what is held back, whole or not."""
        self._write(final=True)

    def _write(self, final: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._context : self._written])
        text = self._tokenizer.decode(self._ids[self._context :])
        whole = final or not text.endswith(_BROKEN_CHARACTER)
        if whole and len(text) > len(before):
            self._on_text(text[len(before) :])
            self._context, self._written = self._written or 0, len(self._ids)


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int = 0) -> None:
    """Raise :class:`InputError` if an option of :func:`generate` is out of range."""
    if 0 < check_number("temperature", temperature) < _LEAST_TEMPERATURE:
        raise InputError(
            f"temperature: {temperature:g} is too little to divide by; give 0, which takes the "
            "likeliest token"
        )
    check_int("top_k", top_k, minimum=0)
    if not check_number("top_p", top_p, maximum=1.0):
        raise InputError("top_p: 0 leaves no token to choose from; give a number up to 1")
    check_int("seed", seed, minimum=0, maximum=_LARGEST_SEED)


def _start(model: PreTrainedModel, prompt: Sequence[int], wanted: int | None) -> tuple[Tensor, int]:
    """Return a prompt's ids, ``(1, length)``, and how many are to be added to them.

    Raises:
        InputError: the prompt or what is wanted does not fit the model, or the memory that is free.
    """
    ids = torch.tensor([list(prompt)])
    count = new_tokens(model, ids.shape[1], wanted)
    check_token_ids(ids, model.config.vocab_size)
    _check_memory(model, ids.shape[1], count)
    return ids, count


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt as its tokenizer begins texts; an empty one is the token that ends them."""
    return [*tokenizer.opening, *encode_text(tokenizer, prompt)] or [tokenizer.eos_id]


def new_tokens(model: PreTrainedModel, prompt_tokens: int, wanted: int | None = None) -> int:
    """Return how many tokens to add to a prompt: as asked, or what there is room for, at most 128.

    Raises:
        InputError: the model is not made for that many, or the number is out of range.
    """
    longest = model.config.max_position_embeddings
    room = longest - prompt_tokens
    if room < 1:
        raise InputError(
            f"prompt: it has {prompt_tokens:,} tokens, and the model is made for {longest:,} with "
            "those that are added; shorten it"
        )
    if wanted is None:
        return min(room, _NEW_TOKENS)
    if check_int("max_new_tokens", wanted) > room:
        raise InputError(
            f"max_new_tokens: {wanted:,} after a prompt of {prompt_tokens:,} tokens are more than "
            f"the {longest:,} that the model is made for; give at most {room}"
        )
    return wanted


def generation_config(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> GenerationConfig:
    """Return transformers' settings of generation; the options are those of :func:`generate`.

    Raises:
        InputError: an option is out of range.
    """
    check_int("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    known = range(model.config.vocab_size)
    own = (end for end in (ends if isinstance(ends, list) else [ends]) if end in known)
    stops = {tokenizer.eos_id, *own}
    kept = min(top_k, model.config.vocab_size)
    sampling = {"temperature": temperature, "top_k": kept, "top_p": top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.eos_id,
        **(sampling if temperature > 0 else {}),
    )
