"""Which mixtures of transformers no SparseMoE holds, and why."""

from __future__ import annotations

from moezoo_models.adopt.block import module_of

_NOT_HELD = {
    ("doge", "DogeCDMoE"): "routes by product keys that mix tokens, view(2, T, -1) of (T, 2n): a "
    "token's experts follow from the logits of another, except where one token comes alone",
    ("nllb_moe", "NllbMoeSparseMLP"): "runs experts 0 and 1 alone, whichever its router chooses: "
    "it reads the mask of first choices, of zeros and ones, as numbers of experts",
    ("vitpose_backbone", "VitPoseBackboneMoeMLP"): "has no router: the data set of an image "
    "chooses its expert, which computes some of the outputs beside a block that computes the rest",
}
REASONS = {f"{module_of(family)}.{name}": reason for (family, name), reason in _NOT_HELD.items()}
"""Blocks that are not held: module path and name of the class, and why."""

ATTENTION = frozenset({f"{module_of('jetmoe')}.JetMoeAttention"})
"""Mixtures of attention heads, which are no feed-forward blocks and stay what they are."""
