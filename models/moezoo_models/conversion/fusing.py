"""Dense blocks of consecutive layers as one wide block, and how much layers depend on each other.

FFN Fusion (Bercovich et al. 2025, arXiv:2503.18908): blocks without attention between them,
computed beside each other instead of after each other, are one block of their widths together,

    x + Σ_i FFN_i(N_i(x)) = x + FFN(N(x)),

gate and up stacked, down concatenated. The paper takes the last block's norm for all; here each
block's own RMSNorm is kept, as its weight is a factor on the columns of gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moezoo.command.messages import size
from moezoo.errors import InputError
from moezoo_models.conversion.source import Source, projection_name
from moezoo_models.conversion.stage import Stage, embed
from moezoo_models.devices import free_memory


def norm_name(layer: int) -> str:
    """Name the weight of the norm before a dense block."""
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def check_fusible(source: Source) -> None:
    """Refuse blocks whose norms are no factors on their inputs, or that have biases.

    Raises:
        InputError: they are.
    """
    ours = source.ours
    if ours.norm != "rms" or ours.norm_placement != "pre":
        raise InputError(
            f"source: a {source.family} has other norms around its blocks than a Llama's RMSNorm "
            "before them; only those can be fused"
        )
    if source.ffn["bias"] or not source.ffn["gated"]:
        raise InputError(
            f"source: blocks of this {source.family} are not gated or have biases; only gated ones "
            "without can be fused"
        )


def fused_projection(source: Source, layers: range, projection: str) -> Iterator[Tensor]:
    """Yield a wide block's ``gate``, ``up`` ``(n F, D)`` or ``down`` ``(D, n F)`` in pieces.

    Args:
        source: the dense model.
        layers: whose blocks.
        projection: which one.
    """
    if projection == "down":
        names = [projection_name(layer, projection) for layer in layers]
        yield torch.cat([source.read(name) for name in names], dim=1)
        return
    for layer in layers:
        weight = source.read(projection_name(layer, projection))
        norm = source.read(norm_name(layer))
        yield (weight.float() * norm.float()).to(weight.dtype)


@torch.no_grad()
def dependencies(
    source: Source,
    tokens_WL: Tensor,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Measure how much what a layer adds changes without an earlier one, ``(L, L)`` fp32.

    Entry (i, j) is ``1 - cos(h_j, h_j without layer i)``, averaged over tokens, where h_j is what
    layer j adds to the residual stream; 0 for j ≤ i.

    Args:
        source: the dense model.
        tokens_WL: windows of text.
        device: where to compute.
        progress: called after each layer.

    Raises:
        InputError: the hidden states need more memory than there is.
    """
    layers = source.num_layers
    needed = 4 * tokens_WL.numel() * source.config.hidden_size * (layers + 3)
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: hidden states without each of {layers} layers need "
            f"{size(needed)} of memory, and {size(free)} are free; lower it"
        )
    found = torch.zeros(layers, layers)
    states = embed(source, tokens_WL)
    without: dict[int, Tensor] = {}
    for layer in range(layers):
        stage = Stage(source, layer, device)
        entering = states
        states = torch.cat(list(stage.outputs(entering, stage.block.run)))
        added = states - entering
        for left_out, before in without.items():
            after = torch.cat(list(stage.outputs(before, stage.block.run)))
            cosine = cosine_similarity(added, after - before, dim=-1).clamp(-1.0, 1.0)
            found[left_out, layer] = float((1 - cosine).mean())
            without[left_out] = after
        without[layer] = entering
        progress()
    return found
