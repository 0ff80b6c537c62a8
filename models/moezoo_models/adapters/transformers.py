"""Private names of transformers, as of 5.23."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def attention_backend(config: PreTrainedConfig) -> Any:
    """Return the name of a configuration's attention backend; None before a model has chosen one.

    transformers 5.23: only models have a public setter, and nothing a public getter. Layers are
    given the configuration. Without it no model of ours knows how to attend.
    """
    return config._attn_implementation


def set_attention_backend(config: PreTrainedConfig, backend: str | None) -> None:
    """Set the attention backend that a model of a configuration will be built with.

    transformers 5.23: a model's ``set_attn_implementation`` comes too late for one that checks its
    backend when it is built. Without it ``load_checkpoint(attention=...)`` has no effect.
    """
    config._attn_implementation = backend


def is_loaded(tensor_or_module: Tensor | nn.Module) -> bool:
    """Return whether transformers has marked a tensor, or a module, as filled.

    transformers 5.23 marks what ``from_pretrained`` loads and what is initialised, for its own
    ``init`` functions to pass over; layers here initialise themselves by torch's. Without it loaded
    weights would be overwritten.
    """
    return bool(getattr(tensor_or_module, "_is_hf_initialized", False))


def initialize_unless_loaded(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialise a module of a model, unless it is marked as filled, and mark it.

    transformers 5.23: the base class's method, past a subclass's own, which has another notion of
    modules that are filled. ``init_weights`` is public and calls it for every module. Without it
    nothing is marked, and :func:`is_loaded` is false of everything that is new.
    """
    PreTrainedModel._initialize_weights(model, module)


def initialize_again(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialise a module of a model, whether it is marked as filled or not.

    transformers 5.23: ``_init_weights`` is the method that subclasses write, under a private name.
    Without it models whose initialisation is deferred cannot be filled.
    """
    initialize: Callable[[nn.Module], None] = model._init_weights
    initialize(module)


def render_generations(
    messages: Sequence[dict[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and the characters within its template's generation marks.

    transformers 5.23: the tokenizer's own method returns the mask only of tokens that it makes
    itself, by ids that read special tokens from messages too. Without it templates with
    ``{% generation %}`` are read as those without.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    return texts[0], [(begin, end) for begin, end in spans[0]]


def keep_contradictions(settings: Any) -> None:
    """Mark generation settings that contradict each other as fit to be saved.

    transformers 5.23 refuses to save such a ``GenerationConfig`` unless its hash is that of the
    object which it read from a file itself. Without it a model with such settings, as published
    ones have now and then, is trained and cannot be saved.

    Args:
        settings: a model's ``generation_config``.
    """
    settings._original_object_hash = hash(settings)


def experts_backend(block: nn.Module) -> str | None:
    """Return how the experts of a mixture block are computed; None where a class has one way only.

    transformers 5.23: only models have a public setter, and nothing a public getter. Without it
    a block's speed would be that of a way which the model does not take.
    """
    config = getattr(getattr(block, "experts", None), "config", None)
    return getattr(config, "_experts_implementation", None)


def set_experts_backend(block: nn.Module, backend: str | None) -> None:
    """Set how the experts of a mixture block are computed; ``eager`` is one after the other.

    transformers 5.23: a model's ``set_experts_implementation`` wants a whole model. Without it a
    block is compared as its default computes, which wants rows of multiples of 16 bytes.
    """
    config = getattr(getattr(block, "experts", None), "config", None)
    if config is not None:
        config._experts_implementation = backend
