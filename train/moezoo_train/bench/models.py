"""The same model twice: ours, and transformers' of the same architecture with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

Family = Literal["llama", "mixtral", "qwen3_moe"]


@dataclass(frozen=True)
class Architecture:
    """A decoder that both sides have.

    Attributes:
        family: as transformers calls it.
        vocabulary: tokens.
        width: of the residual stream; a dense block and the experts of a token are as wide as
            moezoo's defaults have them.
        layers: number of blocks.
        heads: attention heads.
        experts: routed experts; 0 for a dense model.
        top_k: experts per token.
        tied: whether input embedding and head are one matrix.
        kv_heads: key-value heads; 0 for as many as attention heads.
        hidden: width of a dense block; 0 for moezoo's default.
    """

    family: Family
    vocabulary: int
    width: int
    layers: int
    heads: int
    experts: int = 0
    top_k: int = 0
    tied: bool = True
    kv_heads: int = 0
    hidden: int = 0

    @classmethod
    def of(cls, family: Family, sizes: Mapping[str, int], tied: bool = True) -> Architecture:
        """Return the architecture of a case's sizes: V, d, L, H, E and k of a mixture, G and f."""
        mixture = (sizes["E"], sizes["k"]) if "E" in sizes else (0, 0)
        model = (sizes["V"], sizes["d"], sizes["L"], sizes["H"])
        return cls(family, *model, *mixture, tied, sizes.get("G", 0), sizes.get("f", 0))

    def ours(self) -> MoezooForCausalLM:
        """Build our model, without auxiliary losses, which differ between libraries."""
        from moezoo_models import MoezooConfig, MoezooForCausalLM

        rule: dict[str, Any] = {"layers": "all", "class_path": "moezoo.DenseFFN"}
        if self.hidden:
            rule["init_args"] = {"d_ff": self.hidden}
        if self.experts:
            options = {"num_experts": self.experts, "top_k": self.top_k}
            balance = {"load_balancing": 0.0}
            rule["class_path"] = "moezoo.SparseMoE"
            rule["init_args"] = {**options, "balance": balance}
        return MoezooForCausalLM(
            MoezooConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads or self.heads,
                qk_norm=self.family == "qwen3_moe",
                tie_word_embeddings=self.tied,
                max_position_embeddings=1024,
                ffn=[rule],
            )
        )

    def theirs(self, weights: Mapping[str, Tensor], views: bool = False) -> Any:
        """Build transformers' model with given weights, whose names are the same.

        Args:
            weights: by name.
            views: do not copy them, for a model that is not trained.
        """
        import transformers

        prefix = {"llama": "Llama", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}[self.family]
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "head_dim": self.width // self.heads,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        own: dict[str, Any] = {}
        if self.experts:
            hidden = weights["model.layers.0.mlp.experts.down_proj"].shape[2]
            own = {"num_experts_per_tok": self.top_k}
            if self.family == "mixtral":
                own |= {"num_local_experts": self.experts, "intermediate_size": hidden}
                own |= {"sliding_window": None}
            else:
                own |= {"num_experts": self.experts, "moe_intermediate_size": hidden}
                own |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        else:
            own = {"intermediate_size": weights["model.layers.0.mlp.down_proj.weight"].shape[1]}
        config = getattr(transformers, f"{prefix}Config")(**common, **own)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        model.load_state_dict(weights, assign=views)
        if self.experts:
            model.set_experts_implementation("grouped_mm")
        return model


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's tensors, which its training leaves alone."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mapped(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """Write a model's weights to a file and have the model read them there, as a checkpoint is.

    Memory that belongs to a file's cache is read faster than torch's own, whose pages are smaller.

    Returns:
        The weights by name, views of the file.
    """
    from moezoo_models.checkpoints.mapped import map_tensors

    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        first = names.setdefault(tensor.data_ptr(), name)
        if first != name:
            tied[name] = first
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    file = folder / "weights.safetensors"
    save_file(state, file)
    found = map_tensors([file])
    found |= {name: found[first] for name, first in tied.items()}
    model.load_state_dict(found, assign=True)
    return found
