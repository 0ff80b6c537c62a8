"""A model as lm-evaluation-harness wants it.

The harness (Gao et al. 2024, doi:10.5281/zenodo.12608602; the package lm-eval, which the extra
``eval`` brings) asks a model for the log probability of texts, and to continue them.

The base is the harness's ``TemplateLM`` and not its ``HFLM``. That one (lm-eval 0.4.13) pads on the
right and calls the model without a mask and without the lengths, so that padding takes part in
routing; makes the logits of all positions of a batch, those of contexts and padding too; wants a
tokenizer of transformers, which sentencepiece's are not; and needs accelerate. A subclass would
write anew all that is here, and inherit 1,700 lines that never run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from moezoo.errors import InputError, check_int
from moezoo.feed_forward import FeedForward
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.settings import FiniteLogits, generation_config, own_settings
from moezoo_models.evaluation.perplexity import check_loss
from moezoo_models.evaluation.scoring import logits_of, window_length
from moezoo_models.model.inputs import check_token_ids
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import Tokenizer

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256  # the harness's


class HarnessModel(TemplateLM):
    """A causal language model, ours or a stock one, behind the harness's interface.

    Texts of different lengths share a batch. Padding of the shorter ones is masked, for
    attention and for the feed-forward blocks alike, so that it reaches no statistic, takes no
    expert's place and is nobody's earlier token. Layers whose output for a token depends on the
    other texts of a batch all the same, those with a limit on capacity or that are not causal, get
    one text at a time.

    Where a tokenizer puts a token before texts, every text begins with it. Otherwise only an empty
    context is stood for, by the token that ends texts.

    Args:
        model: on any device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        sequence_length: tokens that the model sees at once; default: as for
            :func:`moezoo_models.evaluation.evaluate.evaluate`. Of longer contexts the end is kept.
        batch_size: texts computed at once.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        sequence_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.network = model.eval()
        self.words = tokenizer
        self.length = window_length(model, sequence_length)
        self.batch_size = 1 if _mixes_texts(model) else check_int("batch_size", batch_size)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token from which a text's first one is predicted."""
        return self.words.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, after the token that begins texts unless it is not wanted."""
        opening = [] if add_special_tokens is False else self.words.opening
        return [*opening, *encode_text(self.words, string)]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return continuations' log probabilities in nats, and whether each is the likeliest.

        Context and continuation are encoded together; spaces between them go with the latter.
        """
        return cast("list[tuple[float, bool]]", super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of whole texts, in nats.

        Each token is predicted once, in windows that do not overlap but for the last, which is
        as long as the others.
        """
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.length, 1):
                windows.append((("", text), *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log probability, and whether it is the likeliest throughout.

        Args:
            requests: what is ignored here, the context's tokens, and the continuation's.
        """
        texts = [self._text(context, targets) for _, context, targets in requests]
        answers = [(0.0, True)] * len(texts)  # of continuations without tokens
        asked = [number for number, (_, targets) in enumerate(texts) if targets]
        for batch in self._batches(asked, [len(inputs) for inputs, _ in texts], "scoring"):
            scores = self._score([texts[number] for number in batch])
            for number, score in zip(batch, scores, strict=True):
                answers[number] = score
        return answers

    def _text(self, context: list[int], targets: list[int]) -> tuple[list[int], list[int]]:
        """Return the tokens to read and those to predict at their end."""
        if len(targets) > self.length:
            raise InputError(
                f"sequence_length: an answer has {len(targets)} tokens, more than the model's "
                f"{self.length}; give a larger one"
            )
        whole = [*(context or [self.prefix_token_id]), *targets][-self.length - 1 :]
        return whole[:-1], targets

    def _score(self, texts: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        ids, mask = self._padded([inputs for inputs, _ in texts], left=False)
        network: Any = self.network
        hidden = network.model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        scores = []
        for row, (inputs, targets) in zip(hidden, texts, strict=True):
            logits = logits_of(self.network, row[len(inputs) - len(targets) : len(inputs)])
            wanted = torch.tensor(targets, device=logits.device)
            nats = F.cross_entropy(logits, wanted, reduction="none").double().sum()
            check_loss(float(nats))
            scores.append((-float(nats), bool((logits.argmax(-1) == wanted).all())))
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until one of a task's stop strings, the end of the text, or a length.

        Raises:
            InputError: a task asks for an option of generation that is not known here, or for more
                tokens than the model's window has.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            decoding = Decoding.of(requests[numbers[0]].args[1])
            room = self.length - decoding.max_new_tokens
            if room < 1:
                raise InputError(
                    f"max_gen_toks: {decoding.max_new_tokens} new tokens leave no room for a "
                    f"question in {self.length}; lower it in the task's generation_kwargs, or give "
                    "a larger sequence_length"
                )
            prompts = {
                number: (self.tok_encode(requests[number].args[0]) or [self.eot_token_id])[-room:]
                for number in numbers
            }
            lengths = [len(prompts.get(number, ())) for number in range(len(requests))]
            for batch in self._batches(numbers, lengths, "generating"):
                texts = self._continue([prompts[number] for number in batch], decoding)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
        return answers

    def _continue(self, prompts: list[list[int]], decoding: Decoding) -> list[str]:
        ids, mask = self._padded(prompts, left=True)
        config = generation_config(
            self.network,
            self.words,
            decoding.max_new_tokens,
            decoding.temperature,
            decoding.top_k,
            decoding.top_p,
        )
        read = partial(self._read, prompts, cast("list[int]", config.eos_token_id), ids.shape[1])
        with own_settings(self.network):
            written = continue_ids(
                self.network,
                ids,
                mask,
                config,
                processors=LogitsProcessorList([FiniteLogits()]),
                criteria=StoppingCriteriaList([_Stops(read, decoding.until)]),
            )
        return [decoding.cut(text) for text in read(written)]

    def _read(
        self, prompts: list[list[int]], ends: list[int], width: int, written: Tensor
    ) -> list[str]:
        """Decode what follows the prompts, together with them: a first word may have a space."""
        texts = []
        for prompt, row in zip(prompts, written[:, width:].tolist(), strict=True):
            length = next((n for n, token in enumerate(row) if token in ends), len(row))
            before = self.words.decode(prompt)
            texts.append(self.words.decode([*prompt, *row[:length]])[len(before) :])
        return texts

    def _padded(self, texts: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Stack texts of different lengths: ids and mask ``(batch, longest)`` int64."""
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.eot_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), None) if left else slice(len(text))
            ids[row, place] = torch.tensor(text)
            mask[row, place] = 1
        check_token_ids(ids, self.network.config.vocab_size)
        return ids.to(self.network.device), mask.to(self.network.device)

    def _batches(
        self, numbers: Sequence[int], lengths: Sequence[int], what: str
    ) -> Iterable[list[int]]:
        """Put texts of like length together, the longest first: what fails for memory fails soon.

        Progress is shown on the error output, if that is a terminal.
        """
        order = sorted(numbers, key=lambda number: -lengths[number])
        size = self.batch_size
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
        console = Console(stderr=True)
        return track(
            batches, what, console=console, transient=True, disable=not console.is_terminal
        )


@dataclass(frozen=True)
class Decoding:
    """How a task wants texts continued.

    Attributes:
        until: strings that end a continuation and are no part of it.
        max_new_tokens: at most that many tokens.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among that many likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Decoding:
        """Read a task's ``generation_kwargs`` as the harness does; without sampling, greedily.

        Raises:
            InputError: an option is not known here.
        """
        given = dict(options)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [value for name in _LENGTHS if (value := given.pop(name, None)) is not None]
        temperature = float(given.pop("temperature", None) or 0.0)
        sample = given.pop("do_sample", None)
        if sample is None:
            sample = temperature > 0
        top_k, top_p = given.pop("top_k", 0), given.pop("top_p", 1.0)
        if given.pop("num_beams", 1) != 1:
            raise InputError("num_beams: beams are not searched here; leave it out of the task")
        if given:
            raise InputError(
                f"generation_kwargs: '{min(given)}' is not known here; leave it out of the task"
            )
        return cls(
            tuple(stop for stop in until if stop),
            int(lengths[0]) if lengths else _DEFAULT_LENGTH,
            (temperature or 1.0) if sample else 0.0,
            int(top_k),
            float(top_p),
        )

    def cut(self, text: str) -> str:
        """Leave out the first stop string and all that follows."""
        ends = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]


class _Stops(StoppingCriteria):
    """Ends a row once a stop string is in what was written."""

    def __init__(self, read: Callable[[Tensor], list[str]], until: Sequence[str]) -> None:
        self._read, self._until = read, until

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        texts = self._read(input_ids)
        ended = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _mixes_texts(model: PreTrainedModel) -> bool:
    """Return whether a layer's output for a token depends on the other texts of a batch."""
    layers = [layer for layer in model.modules() if isinstance(layer, FeedForward)]
    return any(not layer.causal or getattr(layer, "capacity", None) for layer in layers)
