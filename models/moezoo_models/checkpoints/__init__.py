"""Hugging Face directories in and out: written whole or not at all, checked when read."""

from typing import TYPE_CHECKING

from moezoo_models.lazy import lazily

if TYPE_CHECKING:
    from moezoo_models.checkpoints.directory import (
        load_checkpoint,
        load_with_tokenizer,
        read_tokenizer,
        save_checkpoint,
    )
    from moezoo_models.checkpoints.stock import load_any_with_tokenizer, load_as_it_is
else:
    __getattr__ = lazily(
        __name__,
        {
            "directory": (
                "load_checkpoint",
                "load_with_tokenizer",
                "read_tokenizer",
                "save_checkpoint",
            ),
            "stock": ("load_any_with_tokenizer", "load_as_it_is"),
        },
    )

__all__ = [
    "load_any_with_tokenizer",
    "load_as_it_is",
    "load_checkpoint",
    "load_with_tokenizer",
    "read_tokenizer",
    "save_checkpoint",
]
