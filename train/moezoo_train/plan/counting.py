"""The parameters that scaling laws count: matrices of a model's blocks, as far as they are used."""

from __future__ import annotations

from torch import nn

from moezoo import DenseFFN
from moezoo.errors import InputError
from moezoo.matrices.kept import kept_share, mean_kept_share
from moezoo.matrices.masked import Latent
from moezoo_models import MoezooForCausalLM
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.plan.laws import FinalCount, MeanCount


def count_weights(key: str, model: MoezooForCausalLM) -> tuple[MeanCount, FinalCount]:
    """Count the weights of all blocks, without embeddings, head, norms, biases and guides.

    Args:
        key: what messages call the model.
        model: dense blocks alone, whose matrices may be sparse.

    Raises:
        InputError: a block is no dense one: of a mixture's parameters a token uses a part, which is
            neither count.
    """
    for number, layer in enumerate(ffn_layers(model)):
        if not isinstance(layer, DenseFFN):
            raise InputError(
                f"{key}: layer {number} is a {type(layer).__name__}; these laws are of dense and "
                "sparse matrices, leave it out"
            )
    total = mean = final = 0.0
    for block in model.model.blocks():
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or name == "guide":
                    continue
                numbers = parameter.numel()
                total += numbers
                mean += numbers * _mean(module, name)
                final += numbers * _final(module, name)
    return MeanCount(mean), FinalCount(final, 1.0 - final / total)


def _mean(module: nn.Module, name: str) -> float:
    is_sparse = isinstance(module, Latent) and name == "latent"
    return mean_kept_share(module) if is_sparse else 1.0  # type: ignore[arg-type]


def _final(module: nn.Module, name: str) -> float:
    is_sparse = isinstance(module, Latent) and name == "latent"
    return kept_share(module, 1.0) if is_sparse else 1.0  # type: ignore[arg-type]
