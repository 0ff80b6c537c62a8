"""Fold experts that read the token alone into tables, in a whole model."""

from __future__ import annotations

from moezoo import MoLE
from moezoo.errors import InputError
from moezoo_models.model.causal_lm import MoezooForCausalLM


def fold_experts(model: MoezooForCausalLM) -> int:
    """Replace each MoLE of a model by its folded form, in place; the model computes the same.

    Its configuration says so, and it is saved and loaded like any other.

    Args:
        model: trained, on one process.

    Returns:
        How many layers were folded.

    Raises:
        InputError: there is none to fold, or a layer is in parts; nothing is changed then.
    """
    decoder = model.model
    blocks = [b for b in decoder.blocks() if isinstance(b.mlp, MoLE) and not b.mlp.folded]
    if not blocks:
        raise InputError("model: it has no MoLE that is not folded; give one that has")
    # All before any is replaced: the first may hold the embeddings that others read.
    folded = [block.mlp.fold() for block in blocks if isinstance(block.mlp, MoLE)]
    for block, layer in zip(blocks, folded, strict=True):
        block.mlp = layer
    decoder.record_ffn_arguments()
    return len(folded)
