"""Published models by name: ``--model.preset OLMoE-1B-7B`` gives the options their defaults.

Each is a YAML file of ``presets/``, read before all other files, so that whatever else is given
wins over it. What was changed is said before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from moezoo.command.names import with_methods
from moezoo.command.settings import read_given, read_settings
from moezoo.errors import InputError, nearest

FOLDER = Path(__file__).parents[1] / "presets"
_OPTION = "--model.preset"


class Published(NamedTuple):
    """The figures that the authors of a model state, as they wrote them.

    Attributes:
        source: where they are stated.
        total: billions of parameters.
        active: of those, what a token takes; None for a dense model.
        blocks: billions of parameters without the embeddings, if that is stated.
        embeds: whether ``active`` counts the table of input embeddings.
        without: what our model leaves out of the published one, if anything.
    """

    source: str
    total: str
    active: str | None = None
    blocks: str | None = None
    embeds: bool = True
    without: str | None = None


_QWEN3 = "model card of Qwen/Qwen3-"
PUBLISHED = {
    "DeepSeek-V2-Lite": Published(
        "model card of deepseek-ai/DeepSeek-V2-Lite",
        "15.7",
        "2.4",
        embeds=False,
        without="YaRN's scaled positions",
    ),
    "DeepSeekMoE-16B": Published("arXiv:2401.06066, table 3", "16.4", "2.8"),
    "GPT-OSS-20B": Published(
        "arXiv:2508.10925, table 1",
        "20.91",
        "3.61",
        embeds=False,
        without="attention sinks, sliding windows in every other block, YaRN's scaled positions",
    ),
    "Mixtral-8x22B": Published("model card of mistralai/Mixtral-8x22B-v0.1", "141", "39"),
    "Mixtral-8x7B": Published("arXiv:2401.04088, section 2.1", "47", "13"),
    "OLMoE-1B-7B": Published("arXiv:2409.02060, table 1", "6.9", "1.3"),
    "Qwen1.5-MoE-A2.7B": Published("model card of Qwen/Qwen1.5-MoE-A2.7B", "14.3", "2.7"),
    "Qwen3-0.6B": Published(f"{_QWEN3}0.6B", "0.6", blocks="0.44"),
    "Qwen3-235B-A22B": Published(f"{_QWEN3}235B-A22B", "235", "22", blocks="234"),
    "Qwen3-30B-A3B": Published(f"{_QWEN3}30B-A3B", "30.5", "3.3", blocks="29.9"),
    "Qwen3-4B": Published(f"{_QWEN3}4B", "4.0", blocks="3.6"),
    "Qwen3-8B": Published(f"{_QWEN3}8B", "8.2", blocks="6.95"),
    "SmolLM2-135M": Published("model card of HuggingFaceTB/SmolLM2-135M", "0.135"),
    "SmolLM2-360M": Published("model card of HuggingFaceTB/SmolLM2-360M", "0.36"),
}
"""Every preset: parameters in billions."""


def check_preset(name: str | None, initialize_from: str | None = None) -> None:
    """Check the name of a preset, and that no other thing says what the model is.

    Raises:
        InputError: there is none of that name, or a directory describes the model, too.
    """
    if name is None:
        return
    _find(name)
    if initialize_from is not None:
        raise InputError(
            f"preset: {name} and initialize_from both say what the model is; give one of the two"
        )


def with_preset(words: Sequence[str]) -> list[str]:
    """Put the file of the preset that a command line or its files name before its other files.

    Args:
        words: a command line whose files come first.

    Raises:
        InputError: there is no preset of that name; the nearest is proposed.
    """
    name = None
    for option, value in _given(words):
        if option == _OPTION:
            name = value
        elif option in ("--config", "-c") and (value.startswith("{") or Path(value).is_file()):
            model = read_given(value).get("model")
            name = model.get("preset", name) if isinstance(model, Mapping) else name
    if name in (None, "null"):
        return list(words)
    first = next(i for i, word in enumerate(words) if word.startswith("-"))
    return [*words[:first], f"--config={_find(name)}", *words[first:]]


def describe_preset(model: Mapping[str, Any], config: PreTrainedConfig) -> str | None:
    """Return the line that says what differs between a run's model and its preset, if it has one.

    Args:
        model: the options of the model, layers written out.
        config: of the model that was built, for its vocabulary.
    """
    if (name := model["preset"]) is None:
        return None
    settings = with_methods(read_settings(str(_find(name))))
    published = {**dict(_leaves(settings["model"])), "vocab_size": settings["data"]["vocab_size"]}
    own = {**dict(_leaves(model)), "vocab_size": config.vocab_size}
    changed = [
        f"{key} {own.get(key)} (published: {value})"
        for key, value in published.items()
        if not _holds(own.get(key), value)
    ]
    text = f"preset {name}: " + (f"changed {', '.join(changed)}" if changed else "as published")
    without = PUBLISHED[name].without
    return f"{text}; without {without}" if without else text


def block_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class path and the arguments of a preset's feed-forward layer.

    Of its blocks in general: exceptions for single blocks are left out.

    Raises:
        InputError: there is no preset of that name; the nearest is proposed.
    """
    ffn = with_methods(read_settings(str(_find(name))))["model"]["ffn"]
    return ffn["class_path"], ffn["init_args"]


def _find(name: Any) -> Path:
    if name not in PUBLISHED:
        raise InputError(f"model.preset: there is no '{name}'{nearest(str(name), PUBLISHED)}")
    return FOLDER / f"{name}.yaml"


def _given(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command line that have a value, with it."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if equals:
            yield option, value
        elif number + 1 < len(words):
            yield option, words[number + 1]


def _holds(own: Any, published: Any) -> bool:
    """Return whether an option is as published; of a rule, what is published of it."""
    if not (isinstance(own, list) and isinstance(published, list)) or len(own) != len(published):
        return bool(own == published)
    return all(
        all(rule.get(key) == value for key, value in theirs.items())
        if isinstance(theirs, Mapping)
        else rule == theirs
        for rule, theirs in zip(own, published, strict=True)
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every innermost option with its dotted key; a list is one, written out."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, [dict(_leaves(each)) if isinstance(each, Mapping) else each for each in value]
    else:
        yield path, value
