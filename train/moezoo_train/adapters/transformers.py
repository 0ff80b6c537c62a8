"""Private API of transformers, as of 5.23."""

from __future__ import annotations

from transformers import PreTrainedConfig


def attention_backend(config: PreTrainedConfig) -> str | None:
    """Return the attention backend of a configuration.

    Uses ``PreTrainedConfig._attn_implementation``, which has no public name. If renamed:
    AttributeError when a model is built.
    """
    found: str | None = config._attn_implementation
    return found


def set_attention_backend(config: PreTrainedConfig, backend: str) -> None:
    """Set the attention backend of a configuration; see :func:`attention_backend`.

    The public argument ``attn_implementation`` belongs to ``from_pretrained`` and ``from_config``,
    by which no model is built here.
    """
    config._attn_implementation = backend
