"""Whether a checkpoint is of this very model and optimizer, said field by field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from moezoo.arguments import as_argument, plain, signature
from moezoo.errors import InputError
from moezoo.feed_forward import registered
from moezoo_models import MoezooConfig
from moezoo_train.checkpoint_structure import check_same

UNRELATED = {
    "use_cache", "initializer_range", "trained_length",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""Fields of a configuration that may change between training and resuming."""

_ORIGIN = {"_name_or_path", "architectures", "dtype", "transformers_version"}
"""Fields of a stock configuration that say where it comes from."""

_OWN_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
}


_RULE = re.compile(r"^ffn\[(\d+)\](: router_input)?")
_MEMORY = re.compile(r"^memory(?=\[\d+\]|:)")


def _rule_key(rule: re.Match[str]) -> str:
    """Return where a user has written a rule of the model: the first one is that of every block."""
    number, read = int(rule[1]), rule[2] is not None
    if number:
        return f"ffn_rules[{number - 1}]{'.router_input' if read else ''}"
    return "router_input" if read else "ffn"


@contextmanager
def own_names() -> Iterator[None]:
    """Replace the configuration's field names in errors by the arguments that a user gave."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for theirs, ours in _OWN_NAMES.items():
            message = message.replace(theirs, ours)
        message = _RULE.sub(lambda m: f"model.{_rule_key(m)}", message)
        message = _MEMORY.sub("model.memory", message)
        raise InputError(message) from error


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Describe a model by the fields, all JSON-able, that its numbers depend on."""
    known = config.to_dict()
    if not isinstance(config, MoezooConfig):
        return {name: value for name, value in known.items() if name not in UNRELATED | _ORIGIN}
    fields = [name for name in MoezooConfig.__annotations__ if name not in UNRELATED]
    return {name: getattr(config, name) for name in fields if name in known}


def unrelated(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the other fields, which a model's directory holds too."""
    known = config.to_dict()
    return {name: known[name] for name in sorted(UNRELATED) if name in known}


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved description with the options that ours have had since, at their defaults.

    A default is what the decoder, or a layer, did before it had the option.
    """
    rules = saved.get("ffn")
    if not isinstance(rules, list):
        return saved
    own = MoezooConfig.__annotations__.keys() - UNRELATED
    known = (spec for spec in fields(MoezooConfig) if spec.name in own)
    defaults = {spec.name: spec.default for spec in known if spec.default is not MISSING}
    memory = [_completed_rule(rule) for rule in saved.get("memory", [])]
    completed = {"ffn": [_completed_rule(rule) for rule in rules], "memory": memory}
    return defaults | saved | completed


def _completed_rule(rule: dict[str, Any]) -> dict[str, Any]:
    layer, found = registered(rule["class_path"]), dict(rule["init_args"])
    immaterial: frozenset[str] = getattr(layer, "immaterial", frozenset())
    for name, parameter in signature(layer).items():
        if name in found:
            found[name] = plain(as_argument(layer, name, found[name]))
        elif parameter.default is not parameter.empty:
            found[name] = plain(parameter.default)
    return {**rule, "init_args": {k: v for k, v in found.items() if k not in immaterial}}


def check_model(saved: dict[str, Any], config: PreTrainedConfig) -> None:
    """Compare a saved description with a model's configuration.

    Both are completed by defaults: a directory from before an option leaves it out, too.

    Raises:
        InputError: as :func:`check_same`.
    """
    check_same("model", completed(saved), completed(describe(config)))


def check_tensors(saved: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Compare names and shapes of two state dictionaries.

    Raises:
        InputError: names the first tensor that differs.
    """
    for name in sorted(saved.keys() ^ current.keys()):
        where = "the checkpoint" if name in saved else "this run's model"
        raise InputError(
            f"ckpt_path: tensor {name} is only in {where}; they are not the same model"
        )
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape:
            raise InputError(
                f"ckpt_path: tensor {name} is {tuple(tensor.shape)} in the checkpoint, "
                f"but {tuple(current[name].shape)} in this run; use the model it was trained as"
            )
