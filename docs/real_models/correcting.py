"""What checks by all of the model win back, and what they take: a table for the page on Sirius.

``python docs/real_models/correcting.py SPARSE DENSE TEXT`` continues passages of a text with a
sparsified checkpoint, with its dense model, and with checks of several kinds, in turn; then the
same with half of the dense model's neurons (GRIFFIN).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.sirius import Corrections, Sirius
from moezoo_models.text.encoding import encode_text


class Clock(BaseStreamer):
    """Notes the process's CPU time at the first new token, which the prompt's pass gives."""

    def __init__(self) -> None:
        self.seen, self.began = 0, 0.0

    def put(self, value: Tensor) -> None:
        """Count a call: the prompt is the first, the first new token the second."""
        self.seen += 1
        if self.seen == 2:
            self.began = time.process_time()

    def end(self) -> None:
        """Do nothing."""


class Way(NamedTuple):
    """One way to continue a prompt: a model, and options of :func:`continue_ids`."""

    name: str
    model: PreTrainedModel
    options: dict[str, Any]


class Answer(NamedTuple):
    """A continuation, and the CPU time of all its tokens but the first."""

    ids: Tensor
    seconds: float


def answer(way: Way, prompt: Tensor, new: int, found: Corrections) -> Answer:
    """Continue one prompt, ``(1, S)``, by so many likeliest tokens; add what checks find."""
    clock = Clock()
    written = continue_ids(
        way.model,
        prompt,
        torch.ones_like(prompt),
        GenerationConfig(max_new_tokens=new, eos_token_id=[], pad_token_id=0),
        processors=LogitsProcessorList(),
        streamer=clock,
        corrections=found,
        **way.options,
    )
    return Answer(written[0, prompt.shape[1] :], time.process_time() - clock.began)


@torch.no_grad()
def loss(dense: PreTrainedModel, prompt: Tensor, ids: Tensor) -> float:
    """Return the mean loss of a continuation, in nats, by the dense model."""
    text = torch.cat([prompt[0], ids])[None]
    logits = dense(text).logits[0, prompt.shape[1] - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids))


def agreeing(ids: Tensor, others: Tensor) -> float:
    """Return the share of a text before its first token that is not another's."""
    return float((ids == others).cumprod(0).float().mean())


def rows(ways: Sequence[Way], prompts: Sequence[Tensor], new: int) -> list[str]:
    """Continue all prompts in all ways, one after the other, of which the first is the dense one.

    Returns:
        A line of a table for each way.
    """
    found = [Corrections() for _ in ways]
    every = [
        [answer(way, prompt, new, counts) for way, counts in zip(ways, found, strict=True)]
        for prompt in prompts
    ]
    lines = []
    for number, way in enumerate(ways):
        own = [answers[number] for answers in every]
        same = statistics.mean(
            agreeing(each.ids, answers[0].ids) for each, answers in zip(own, every, strict=True)
        )
        dense = ways[0].model
        nats = statistics.mean(
            loss(dense, prompt, each.ids) for prompt, each in zip(prompts, own, strict=True)
        )
        took = statistics.median(each.seconds for each in own) / (new - 1) * 1e3
        cells = [way.name, f"{same:.2f}", f"{torch.tensor(nats).exp():.3f}", f"{took:.1f}"]
        whole = found[number]
        if whole.checks:
            cells += [f"{whole.advance:.2f}", f"{whole.rolled_back:.0%}"]
            cells += [f"{whole.read:.2f}", f"{whole.work:.2f}"]
        else:
            cells += ["–"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt_tokens", type=int, default=40)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--periods", type=int, nargs="+", default=[16])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    given = parser.parse_args(arguments)
    load = partial(load_any_with_tokenizer, tokenizer=None, device=torch.device("cpu"))
    sparse, words = load(given.sparse)
    dense, _ = load(given.dense)
    stream = torch.tensor(encode_text(words, given.text.read_text(encoding="utf-8")))
    begins = torch.linspace(0, len(stream) - given.prompt_tokens, given.prompts).long().tolist()
    prompts = [stream[begin : begin + given.prompt_tokens][None] for begin in begins]
    checks = [Sirius(period, t) for period in given.periods for t in given.thresholds]
    for model, name, half in ((sparse, "thresholds", {}), (dense, "GRIFFIN", {"griffin": 0.5})):
        ways = [Way("full model", dense, {}), Way(f"{name} alone", model, half)]
        for options in checks:
            label = f"period {options.period}, threshold {options.threshold:g}"
            ways.append(Way(label, model, {**half, "sirius": options}))
        print("\n".join(rows(ways, prompts, given.new)), flush=True)


if __name__ == "__main__":
    main()
