"""Greedy replies, token by token, against transformers, llama.cpp and one read of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moezoo.bench.case import Case, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Task, timed
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.bench.models import Architecture, Family, mapped

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

_TRANSFORMERS = Package("transformers", "pip install 'moezoo[train]'")


class Numerals(Tokenizer):
    """Writes each token as its number, so that texts can be compared token by token.

    Args:
        vocab_size: tokens, of which the last ends a text.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bos_id = None
        self.eos_id = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Return the numbers that a text holds."""
        return [int(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return numbers, each with a space behind it."""
        return "".join(f"{token} " for token in ids)

    def save(self, directory: str | Path) -> None:
        """There is nothing to save."""

    def fingerprint(self) -> str:
        """Return the vocabulary's size, which is all there is."""
        return str(self.vocab_size)


@dataclass(frozen=True)
class Reply:
    """What all sides are given: a model's shape and weights, and prompts ``(B, P)``."""

    architecture: Architecture
    weights: Mapping[str, Tensor]
    prompts: Tensor
    new: int

    def job(self, reply: Callable[[], Tensor], note: str = "") -> Job:
        """Return the job whose answer are the new tokens ``(B, new)``."""
        return Job(timed(reply), lambda: {"the tokens": reply()}, note=note)


def _build(setting: Setting, folder: Path, family: Family) -> Task:
    architecture = Architecture.of(family, setting.sizes, tied=False)
    model = architecture.ours().eval()
    with torch.no_grad():
        model.lm_head.weight[-1] = 0.0  # the token that ends a text is never the likeliest
    prompts = torch.randint(setting["V"] - 1, (setting["B"], setting["P"]))
    parts = Reply(architecture, mapped(model, folder), prompts, setting["N"])
    reply = partial(replied, model, parts)
    return Task(parts.job(reply), parts, amount=setting["N"])


def replied(model: MoezooForCausalLM, parts: Reply) -> Tensor:
    """Continue the prompts as the command does that takes so many."""
    return told(model, parts) if len(parts.prompts) == 1 else _batch(model, parts)


def told(model: MoezooForCausalLM, parts: Reply) -> Tensor:
    """Continue one prompt as `moezoo generate` does, text included."""
    from moezoo_models.generate import continue_text

    words = Numerals(parts.architecture.vocabulary)
    prompt = words.decode(parts.prompts[0].tolist())
    text = continue_text(model, words, prompt, max_new_tokens=parts.new, temperature=0.0)
    return torch.tensor([words.encode(text)])


def _batch(model: MoezooForCausalLM, parts: Reply) -> Tensor:
    """Continue several prompts as `moezoo evaluate --tasks` does."""
    from transformers import LogitsProcessorList

    from moezoo_models.decoding.loop import continue_ids
    from moezoo_models.generate import generation_config

    words, ids = Numerals(parts.architecture.vocabulary), parts.prompts
    config = generation_config(model, words, parts.new, 0.0, 0, 1.0)
    written = continue_ids(
        model, ids, torch.ones_like(ids), config, processors=LogitsProcessorList()
    )
    return written[:, ids.shape[1] :]


def generated(model: Any, parts: Reply) -> Tensor:
    """Continue the prompts by transformers' ``generate``."""
    from transformers import GenerationConfig

    ids, end = parts.prompts, parts.architecture.vocabulary - 1
    config = GenerationConfig(
        max_new_tokens=parts.new, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    with torch.no_grad():
        written: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return written[:, ids.shape[1] :]


def transformers_reply(parts: Reply) -> Job:
    """Its model and its ``generate``; attention by sdpa and experts by grouped_mm."""
    model = parts.architecture.theirs(parts.weights, views=True).eval()
    return parts.job(partial(generated, model, parts))


def _one_read(parts: Reply) -> Job:
    """Read, for each new token, the weights that it needs: of each block the experts of its batch.

    Experts are drawn evenly, as fresh routers do about. Embeddings are not read: a row is nothing.
    """
    experts, top_k = parts.architecture.experts, parts.architecture.top_k
    read: list[Tensor] = []
    for name, tensor in parts.weights.items():
        if name == "model.embed_tokens.weight":
            continue
        if tensor.ndim == 3:
            drawn = torch.rand(len(parts.prompts), experts).topk(top_k).indices.unique()
            read += [tensor[expert] for expert in drawn]
        else:
            read.append(tensor)

    def reply() -> None:
        for _ in range(parts.new):
            for tensor in read:
                tensor.sum()

    size = sum(tensor.nbytes for tensor in read)
    return Job(timed(reply), dict, note=f"{size / 1e6:,.0f} MB per token")


_LARGE = {"V": 32000, "d": 512, "L": 8, "H": 8}
_DEMO = {"V": 2048, "d": 128, "L": 4, "H": 4}
_QUICK = {"V": 64, "d": 32, "L": 2, "H": 2, "P": 4, "N": 4}


def _case(name: str, sizes: dict[str, int], batch: int, mixture: bool) -> Case:
    own = {"E": 8, "k": 2} if mixture else {}
    reading = Target(forward=0.8) if mixture and batch == 1 and sizes is _LARGE else None
    return Case(
        name if batch == 1 else f"{name}-b{batch}",
        "end-to-end",
        f"greedy reply{', demo' if sizes is _DEMO else ''}",
        {"B": batch, "P": 16, "N": 32, **sizes, **own},
        {**_QUICK, "B": min(batch, 2), **({"E": 4, "k": 2} if mixture else {})},
        partial(_build, family="qwen3_moe" if mixture else "llama"),
        {
            "transformers": Peer(
                transformers_reply, _TRANSFORMERS, target=Target(forward=1.6) if mixture else None
            ),
            "one read of the weights": Peer(_one_read, same=False, target=reading),
        },
        unit="ms/token",
    )


CASES = [
    _case(name, sizes, batch, mixture)
    for name, sizes, mixture in (
        ("decode-e8", _LARGE, True),
        ("decode-dense", _LARGE, False),
        ("decode-demo", _DEMO, True),
    )
    for batch in (1, 8)
]
