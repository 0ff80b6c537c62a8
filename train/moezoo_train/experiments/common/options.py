"""Options that every experiment has: its text, and its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextOptions:
    """The text that every run learns from.

    Attributes:
        source: "stdlib", a .txt, .jsonl or .parquet file, a folder or glob of those, or
            "hf:NAME[:CONFIG]".
        data_dir: where the prepared tokens are kept.
        max_bytes: use only about this much of the text.
        vocab_size: tokens of the tokenizer that is trained on it.
        val_fraction: share of the documents that is held out.
        sequence_length: tokens per window.
        batch_size: windows per optimizer step.
    """

    source: str = "stdlib"
    data_dir: str = "runs/compare/data"
    max_bytes: int | None = 2_000_000
    vocab_size: int = 1024
    val_fraction: float = 0.05
    sequence_length: int = 128
    batch_size: int = 16


@dataclass(frozen=True)
class ModelOptions:
    """The decoder around the layers that are compared.

    Attributes:
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads; d_model must be a multiple.
    """

    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
