"""Experts that are the feed-forward blocks of several fine-tunes of one model.

What mergekit-moe writes, and Branch-Train-MiX mixes (Sukhbaatar et al. 2024, arXiv:2403.07816):
each model gives one expert per layer, a base everything else. Their other parts are not kept, and
how far those are from the base's is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.command.settings import read_settings
from moezoo.convert import LayerPlan
from moezoo.errors import InputError, check_choice, nearest
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.stage import Stage, embed
from moezoo_models.text.encoding import encode_text

ROUTERS = ("random", "zeros", "hidden", "inputs")
"""Where the routers of a mixture of fine-tunes come from."""
READING = ("hidden", "inputs")
"""Those that follow from prompts."""

_BLOCK = ".mlp."
_PARTS = {
    "embeddings": ("embed_tokens",),
    "attention": ("self_attn", "attn"),
    "norms": ("norm",),
    "head": ("lm_head",),
}
_FREE = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chat_template",
    "eos_token_id",
    "pad_token_id",
    "trained_length",
    "transformers_version",
    "use_cache",
)
"""Fields of a configuration in which fine-tunes may differ: none decides what a layer computes."""


@dataclass(frozen=True)
class Prompts:
    """Texts that an expert is for, and texts that it is not for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


def check_alike(base: Source, others: Sequence[Source]) -> None:
    """Refuse models that are not fine-tunes of one, naming every field in which they differ.

    Raises:
        InputError: configurations, shapes, dtypes or tokenizers differ.
    """
    own = read_tokenizer(base.directory)
    for other in others:
        faults = list(_faults(base, other))
        theirs = read_tokenizer(other.directory)
        if own is not None and theirs is not None and own.fingerprint() != theirs.fingerprint():
            faults.append("tokenizer: they give other tokens")
        if faults:
            raise InputError(
                f"source: {other.directory} is no fine-tune of {base.directory}: "
                f"{'; '.join(faults)}; give models of one architecture, size and tokenizer"
            )


def _faults(base: Source, other: Source) -> Iterator[str]:
    """Yield the fields in which two models differ, with both values."""
    if base.family != other.family:
        yield f"model_type: {other.family}, not {base.family}"
        return
    ours, theirs = base.config.to_dict(), other.config.to_dict()
    dtypes = ("dtype", "torch_dtype")  # said of the tensors below
    for name in sorted({*ours, *theirs} - {*_FREE, *dtypes}):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {theirs.get(name)!r}, not {ours.get(name)!r}"
            if name == "num_hidden_layers":
                return
    for name, info in base.tensors.items():
        found = other.tensors.get(name)
        if found is None:
            yield f"{name}: it has none"
        elif (found.shape, found.kind) != (info.shape, info.kind):
            yield f"{name}: {found.shape} in {found.kind}, not {info.shape} in {info.kind}"
        else:
            continue
        return  # what is wrong with one is mostly wrong with many
    if more := next((name for name in other.tensors if name not in base.tensors), None):
        yield f"{more}: the base has none"


def differences(base: Source, others: Sequence[Source]) -> dict[str, float]:
    """Measure how far fine-tunes are from a base, part by part.

    Returns:
        For embeddings, attention, norms, head and, as ``experts``, the feed-forward blocks: the
        largest ``‖theirs - base's‖ / ‖base's‖`` (Frobenius) of any tensor in any fine-tune.
    """
    found: dict[str, float] = {}
    for name in base.tensors:
        part = _part(name)
        own = base.read(name).double()
        size = float(own.norm())
        for other in others:
            if other is base:
                continue
            distance = float((other.read(name).double() - own).norm())
            relative = distance / size if size else (math.inf if distance else 0.0)
            found[part] = max(found.get(part, 0.0), relative)
        found.setdefault(part, 0.0)
    return found


def _part(name: str) -> str:
    if _BLOCK in name:
        return "experts"
    for part, words in _PARTS.items():
        if any(word in name for word in words) and not (part == "attention" and "norm" in name):
            return part
    return "others"


def describe(found: Mapping[str, float]) -> str:
    """Return the line that says what of the fine-tunes a mixture does not hold."""
    lost = ", ".join(f"{part} {value:.1e}" for part, value in found.items() if part != "experts")
    return (
        f"not kept of the fine-tunes, as distance from the base: {lost}; kept as experts: "
        f"{found['experts']:.1e}"
    )


def read_prompts(file: str | Path, experts: int) -> list[Prompts]:
    """Read which texts each expert is for, from YAML.

    It holds a list ``experts``, in the order of the models: each with ``positive``, texts, and
    perhaps ``negative``.

    Raises:
        InputError: it cannot be read, or has another form or length.
    """
    try:
        raw: Any = read_settings(str(file))
    except InputError as error:
        raise InputError(f"prompts: {str(error).removeprefix('config: ')}") from error
    entries = raw.get("experts")
    if set(raw) != {"experts"} or not isinstance(entries, list):
        raise InputError(f"prompts: {file} has to hold a list named experts, and nothing else")
    if len(entries) != experts:
        raise InputError(
            f"prompts: {file} has {len(entries)} experts, and there are {experts} models; give "
            "one entry per model, in their order"
        )
    return [_entry(f"prompts: experts[{i}]", entry) for i, entry in enumerate(entries)]


def _entry(field: str, entry: Any) -> Prompts:
    if not isinstance(entry, dict):
        raise InputError(f"{field}: write positive: [texts], and perhaps negative: [texts]")
    known = [each.name for each in dataclasses.fields(Prompts)]
    for name, texts in entry.items():
        if name not in known:
            raise InputError(f"{field}.{name}: no such key{nearest(str(name), known)}")
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise InputError(f"{field}.{name}: give a list of texts, none of them empty")
    if not entry.get("positive"):
        raise InputError(f"{field}.positive: is missing; give texts that the expert is for")
    return Prompts(tuple(entry["positive"]), tuple(entry.get("negative", ())))


@torch.no_grad()
def prompt_routers(base: Source, prompts: Sequence[Prompts], kind: str) -> dict[int, Tensor]:
    """Compute routers whose rows point to the hidden states of prompts.

    A row is the mean over positive prompts of the mean over their tokens, minus the same of
    negative ones, divided by its length. Of mergekit-moe's ``hidden`` this is the hidden state that
    comes into a layer, with all prompts weighing the same; ``inputs`` takes instead what a router
    is given: after attention and the norm.

    Args:
        base: the model that computes them, one layer in memory at a time.
        prompts: one per expert.
        kind: hidden or inputs.

    Returns:
        ``(experts, d_model)`` fp32 by layer.

    Raises:
        InputError: there is no tokenizer, or a text is empty or too long for the model.
    """
    check_choice("router", kind, READING)
    tokenizer = read_tokenizer(base.directory)
    if tokenizer is None:
        raise InputError(
            f"tokenizer: {base.directory} holds none, and prompts are texts; copy "
            "tokenizer.json there"
        )
    longest = base.config.max_position_embeddings
    states: dict[str, Tensor] = {}
    for text in dict.fromkeys(t for each in prompts for t in (*each.positive, *each.negative)):
        ids = encode_text(tokenizer, text)
        if not 0 < len(ids) <= longest:
            raise InputError(
                f"prompts: {text[:40]!r} has {len(ids)} tokens; the model takes 1 to {longest}"
            )
        states[text] = embed(base, torch.tensor([ids]))
    routers: dict[int, Tensor] = {}
    for layer in range(base.num_layers):
        stage = Stage(base, layer, torch.device("cpu"))
        means: dict[str, Tensor] = {}
        for text, came_in in states.items():
            (went_out,), inputs = _through(stage, came_in)
            means[text] = (came_in[0] if kind == "hidden" else inputs).mean(dim=0)
            states[text] = went_out
        routers[layer] = torch.stack([_direction(each, means) for each in prompts])
    return routers


def _through(stage: Stage, states: Tensor) -> tuple[list[Tensor], Tensor]:
    """Pass one text through a layer; return what comes out, and what its block is given."""
    inputs: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        inputs.append(x)
        return stage.block.run(x)

    return list(stage.outputs(states, answer)), torch.cat(inputs)


def _direction(prompts: Prompts, means: Mapping[str, Tensor]) -> Tensor:
    row = torch.stack([means[text] for text in prompts.positive]).mean(dim=0)
    if prompts.negative:
        row = row - torch.stack([means[text] for text in prompts.negative]).mean(dim=0)
    return row / row.norm().clamp_min(1e-8)


def zero_routers(base: Source, experts: int) -> dict[int, Tensor]:
    """Return routers that choose the first experts for every token, until they are trained."""
    return {n: torch.zeros(experts, base.config.hidden_size) for n in range(base.num_layers)}


def of_several(
    plan: Callable[[int], LayerPlan],
    granularity: int,
    router: Callable[[int], Tensor | None],
    several: bool = True,
) -> Callable[[int], LayerPlan]:
    """Return plans whose experts are of one model each instead of copies of one.

    Args:
        plan: plans a layer of copies.
        granularity: experts that each copy is cut into.
        router: gives a layer's router, ``(models, d_model)``; None leaves the plan's.
        several: false if they stay copies of one, and only routers change.
    """

    def changed(layer: int) -> LayerPlan:
        made = plan(layer)
        experts = made.experts
        if several:
            experts = tuple(
                dataclasses.replace(expert, block=1 + number // granularity)
                for number, expert in enumerate(experts)
            )
        rows = router(layer)
        rows = made.router if rows is None else rows.repeat_interleave(granularity, dim=0)
        return dataclasses.replace(made, experts=experts, router=rows)

    return changed
