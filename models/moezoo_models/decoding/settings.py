"""What a continuation begins with: ids that fit the model, and transformers' settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from moezoo.errors import InputError, check_int, check_number
from moezoo_models.devices import free_memory
from moezoo_models.model.inputs import check_token_ids
from moezoo_models.model.latent_options import cached_numbers
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import Tokenizer

_LARGEST_SEED = (1 << 63) - 1
_LEAST_TEMPERATURE = 1e-6
_NEW_TOKENS = 128


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int = 0) -> None:
    """Raise :class:`InputError` if an option of `moezoo generate` is out of range."""
    if 0 < check_number("temperature", temperature) < _LEAST_TEMPERATURE:
        raise InputError(
            f"temperature: {temperature:g} is too little to divide by; give 0, which takes the "
            "likeliest token"
        )
    check_int("top_k", top_k, minimum=0)
    if not check_number("top_p", top_p, maximum=1.0):
        raise InputError("top_p: 0 leaves no token to choose from; give a number up to 1")
    check_int("seed", seed, minimum=0, maximum=_LARGEST_SEED)


def start_of(
    model: PreTrainedModel, prompt: Sequence[int], wanted: int | None
) -> tuple[Tensor, int]:
    """Return a prompt's ids, ``(1, length)``, and how many are to be added to them.

    Raises:
        InputError: the prompt or what is wanted does not fit the model, or the memory that is free.
    """
    ids = torch.tensor([list(prompt)])
    count = new_tokens(model, ids.shape[1], wanted)
    check_token_ids(ids, model.config.vocab_size)
    _check_memory(model, ids.shape[1], count)
    return ids, count


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
    """Return transformers' settings of generation; the options are those of `moezoo generate`.

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
