"""Which mixtures of transformers no SparseMoE holds, and why."""

from __future__ import annotations

from moezoo_models.adopt.table import module_of

_APART = (
    "keeps each expert in a module of its own, which a SparseMoE keeps as one tensor: to hold them "
    "would mean to copy them"
)
_HASHED = "routes by a table of token ids in this layer, where a SparseMoE reads hidden states"
OTHER_ROUTERS = {f"{module_of('deepseek_v4')}.DeepseekV4HashRouter": _HASHED}
"""Routers that a class of blocks may have too, and why those are not held."""
_NOT_HELD = {
    ("dbrx", "DbrxFFN"): "stores gate and up apart, which a SparseMoE stores as one tensor: to "
    "hold them would mean to copy them",
    ("doge", "DogeCDMoE"): "routes by product keys that mix tokens: view(2, T, -1) of (T, 2n)",
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeBlock"): "has other experts for image tokens, which it "
    "is told apart by an argument of its own",
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeSparseMoeBlock"): "is one of two that a block chooses from",
    ("nllb_moe", "NllbMoeSparseMLP"): _APART,
    ("switch_transformers", "SwitchTransformersSparseMLP"): _APART,
    ("vitpose_backbone", "VitPoseBackboneMoeMLP"): "has no router: the data set of an image "
    "chooses its expert",
    ("zaya", "ZayaSparseMoeBlock"): "has a router of several layers whose state goes from block to "
    "block",
}
REASONS = {f"{module_of(family)}.{name}": reason for (family, name), reason in _NOT_HELD.items()}
"""Blocks that are not held: module path and name of the class, and why."""

ATTENTION = frozenset({f"{module_of('jetmoe')}.JetMoeAttention"})
"""Mixtures of attention heads, which are no feed-forward blocks and stay what they are."""
