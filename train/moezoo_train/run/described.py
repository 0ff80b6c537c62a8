"""What a run says of where its model comes from, before it trains."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from jsonargparse import Namespace
from transformers import PreTrainedConfig

from moezoo import DenseFFN
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.presets import describe_preset

_NOT_OF_THE_MODEL = ("vocab_size", "attention")  # of the data; used with any model


def describe_model(model: Mapping[str, Any], config: PreTrainedConfig) -> str | None:
    """Return the line on a run's preset, or on options that a trained model leaves without effect.

    Args:
        model: the options of the model, layers written out.
        config: of the model that was built.
    """
    if model["initialize_from"] is None:
        return describe_preset(model, config)
    if unused := _unused(model):
        return (
            f"model.initialize_from: {model['initialize_from']} says what the model is; not used: "
            f"{', '.join(unused)}"
        )
    return None


def _unused(model: Mapping[str, Any]) -> list[str]:
    """Return which options that describe a new model are not as by default."""
    parameters = inspect.signature(LanguageModel).parameters
    names = [name for name in parameters if name not in _NOT_OF_THE_MODEL]
    return [
        name
        for name in names[: names.index("initialize_from")]
        if not _is_default(name, model[name], parameters[name].default)
    ]


def _is_default(name: str, value: Any, default: Any) -> bool:
    if name != "ffn":
        return bool(value == default)
    usual = inspect.signature(DenseFFN).parameters
    given = _plain(value.get("init_args") or {})
    return value["class_path"].rpartition(".")[2] == DenseFFN.__name__ and all(
        name in usual and each == _plain(usual[name].default) for name, each in given.items()
    )


def _plain(value: Any) -> Any:
    """Return options as the mapping that a configuration writes for them."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.as_dict() if isinstance(value, Namespace) else value
