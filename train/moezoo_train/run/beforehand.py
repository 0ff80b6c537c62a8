"""Checks that need no tokens, and so run before tokenization, which may take hours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

from moezoo import HashLayer
from moezoo.errors import InputError
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.checkpoint import identity
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.checkpoint_structure import CONFIG_KEY, check_same
from moezoo_train.finetune.pretrained import check_length, check_tokenizer
from moezoo_train.optim.optimizer import build_optimizer, is_sparse
from moezoo_train.optim.schedule import build_schedule
from moezoo_train.parallel.fit_strategy import check_sparse_gradients, check_strategy
from moezoo_train.parallel.sharded_checkpoints import REST, is_sharded_checkpoint
from moezoo_train.run.hash_tables import baseline_embeddings

if TYPE_CHECKING:
    from moezoo_train.data.datamodule import TokenDataModule
    from moezoo_train.run.module import LanguageModel


def check_run(
    trainer: Trainer, module: LanguageModel, data: TokenDataModule, checkpoint: str | None
) -> None:
    """Refuse a training run that would be refused once the text is prepared.

    All of it is judged again where it is used, as runs from Python do not come by here.

    Args:
        trainer: about to fit.
        module: the model.
        data: the text; nothing of it is read.
        checkpoint: path of the checkpoint to go on from, if any.

    Raises:
        InputError: names the option to change.
    """
    check_evaluation(trainer, module, data, checkpoint, fitting=True)
    optimizer = build_optimizer(module.model, module.optimizer_config, fused=False)
    if any(is_sparse(group) for group in optimizer.param_groups):
        check_sparse_gradients(trainer.strategy, module.compile_model)
    if trainer.max_steps > 0 and not getattr(trainer, "fast_dev_run", False):
        # Epochs may make it shorter, which only the text tells.
        build_schedule(optimizer, module.schedule.config, trainer.max_steps)
    waiting = [m for m in module.model.modules() if isinstance(m, HashLayer) and m.missing_input]
    if checkpoint is None and any(layer.missing_input == "embeddings" for layer in waiting):
        baseline_embeddings(module.hash_embeddings_from, module.model.config.vocab_size)


def check_evaluation(
    trainer: Trainer,
    module: LanguageModel,
    data: TokenDataModule,
    checkpoint: str | None,
    fitting: bool = False,
) -> None:
    """Refuse what ``moezoo validate`` or ``test`` would refuse later; see :func:`check_run`.

    Raises:
        InputError: names the option to change.
    """
    check_length(module.model, data.sequence_length)
    check_strategy(trainer.strategy, module, fitting)
    text = data.source is not None or data.sources is not None
    if module.initialize_from is not None and text and data.tokenizer_name:
        check_tokenizer(module.initialize_from, load_tokenizer(data.tokenizer_name))
    if checkpoint is not None and "://" not in checkpoint:
        _check_checkpoint(Path(checkpoint), module, fitting)


def _check_checkpoint(path: Path, module: LanguageModel, fitting: bool) -> None:
    """Compare what a checkpoint says it is of; its tensors stay on the disk."""
    saved = read_description(path)
    if saved is None:
        raise InputError(f"ckpt_path: {path} was not written by moezoo fit")
    with identity.own_names():
        identity.check_model(saved["config"], module.model.config)
    module.part.check_saved(saved, module.model)
    if fitting and "optimizer" in saved:
        # Without what depends on the device, which is not known yet.
        now = {**asdict(module.optimizer_config), "muon_dtype": None}
        check_same("optimizer", {**saved["optimizer"], "muon_dtype": None}, now)


def read_description(path: Path | str) -> dict[str, Any] | None:
    """Return what a checkpoint says it is of; None if it was not written by ``moezoo fit``.

    Args:
        path: of a file or directory, or ``s3://…`` and the like; tensors are left where they are.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    description: dict[str, Any] | None = _read(path).get(CONFIG_KEY)
    return description


def _read(path: Path | str) -> dict[str, Any]:
    try:
        content = _load_remote(path) if isinstance(path, str) else _map(path)
    except Exception:  # whatever is wrong with it, reading it as a run does says it
        content = None
    if isinstance(content, dict) and "state_dict" in content:
        return content
    return AtomicCheckpointIO().load_checkpoint(path)


def _map(path: Path) -> Any:
    file = path / REST if is_sharded_checkpoint(path) else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _load_remote(url: str) -> Any:
    """Read a checkpoint but for its tensors, which get no memory."""
    with get_filesystem(url).open(url, "rb") as file:
        return torch.load(file, map_location="meta", weights_only=True)
