"""A model of ours as the stock architecture that computes the same, for `moezoo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moezoo.errors import InputError
from moezoo.layers.dense import DenseFFN
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.directory import existing, load_checkpoint, write_model
from moezoo_models.checkpoints.export import making, save_stock, written_as
from moezoo_models.export.mixtures import as_stock_mixture
from moezoo_models.text.tokenizer import Tokenizer


def export_stock(checkpoint: str | Path, target: str | Path) -> Path:
    """Write a model of ours as a stock one, whichever computes the same.

    A dense one as Llama, Mistral, Qwen2, Qwen3 or StableLM; a mixture as Mixtral, Qwen2-MoE,
    Qwen3-MoE, GLM4-MoE, GraniteMoE, DeepSeek-V2 or DeepSeek-V3.

    Args:
        checkpoint: directory of a model of ours.
        target: directory to make.

    Returns:
        The directory.

    Raises:
        InputError: no stock architecture computes the same, or ``target`` has something in it.
    """
    with making(target) as directory:
        try:
            config, size = write_stock(checkpoint, directory)
        except InputError as error:
            if str(error).endswith("keep it as it is"):
                raise InputError(f"{error}, or add --with_code") from error
            raise
    print(f"{config.model_type:<12}{size / 1e6:,.3g} M parameters, {directory}")
    return directory


def write_stock(checkpoint: str | Path, target: Path) -> tuple[Any, int]:
    """Write a model of ours as a stock one; return its configuration and number of parameters.

    Raises:
        InputError: as :func:`export_stock`.
    """
    source = existing(Path(checkpoint))
    model, tokenizer = load_checkpoint(source)
    if all(isinstance(layer.mlp, DenseFFN) for layer in model.model.layers):
        return save_stock(target, model, tokenizer, source), model.num_parameters()
    stock = as_stock_mixture(model)
    _save(target, stock, tokenizer, source)
    return stock.config, model.num_parameters()


def _save(target: Path, stock: PreTrainedModel, tokenizer: Tokenizer | None, source: Path) -> None:
    with replacing_directory(target, "target") as fresh:
        write_model(fresh, target, stock)
        if tokenizer is not None:
            tokenizer.save(fresh)
        carry_over([source], fresh, written_as(stock.config.model_type))
