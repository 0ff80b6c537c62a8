"""Sparse memory finetuning (Lin et al. 2025, arXiv:2510.15103): learn new facts in few rows.

Everything is frozen but the tables of values, and in each step only the ``t`` rows are trained that
the batch reads much and other text seldom. Row i of a table scores

    c(i) / Σ_j c(j) · log((|B| + 1) / (Σ_{b in B} 1[c_b(i) > 0] + 1))

where c(i) counts how often the batch reads it and c_b(i) how often background batch b does: term
frequency times inverse document frequency, a document being a batch. What is computed forward is
the same as ever. Gradients are sparse tensors, of which the rows that are not chosen are dropped
before they are clipped and stepped along; nothing of the size of a table is made but its counts.

The authors freeze rows inside the forward pass, ``V m + sg(V) - sg(V m)``. The gradient is the
same, but theirs is dense.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo.routing.query_network import QueryNetwork
from moezoo_models.model.head import IGNORED
from moezoo_train.finetune.background import Background
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.finetune.slot_counts import SlotCounter, memory_tables
from moezoo_train.optim.optimizer import OptimizerConfig


@dataclass(frozen=True)
class SparseMemoryOptions:
    """Which rows of the tables are trained.

    Attributes:
        rows: t, the most rows of each table that a step changes.
        background: file that `moezoo inspect background` wrote of this model; without it rows are
            ranked by how often the batch reads them, whatever other text does.
    """

    rows: int = 500
    background: str | None = None

    def __post_init__(self) -> None:
        check_int("sparse_memory.rows", self.rows)


def check_sparse_memory(
    options: SparseMemoryOptions | None,
    base: str | None,
    lora: LoRAOptions | None,
    optimizer: OptimizerConfig,
    compiled: bool,
) -> None:
    """Refuse options that do not go with sparse memory finetuning.

    Raises:
        InputError: names the option to change.
    """
    if options is None:
        return
    if base is None:
        raise InputError("sparse_memory: it trains on a trained model; set initialize_from")
    if lora is not None:
        raise InputError("sparse_memory: rows are trained or adapters; set it or lora to null")
    if optimizer.name == "muon":
        raise InputError(
            "optimizer.name: muon is for whole matrices, not for rows of tables; use sgd or adamw"
        )
    if compiled:
        raise InputError("compile: torch.compile has no sparse gradients; set it to false")


def describe_sparse_memory(options: SparseMemoryOptions | None) -> dict[str, Any]:
    """Describe how rows are chosen, for a checkpoint; nothing without.

    Raises:
        InputError: there is no background file.
    """
    if options is None:
        return {}
    content = None
    if options.background is not None:
        file = Path(options.background)
        if not file.is_file():
            raise InputError(
                f"sparse_memory.background: there is no file {file}; write it with `moezoo inspect "
                "background`"
            )
        content = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"rows": options.rows, "background": content}


def freeze_all_but_tables(model: PreTrainedModel, base: str) -> None:
    """Freeze all but the tables of values, whose gradients become sparse; in place.

    Raises:
        InputError: the model has none.
    """
    tables = memory_tables(model)
    if not tables:
        raise InputError(
            f"sparse_memory: {base} has no table of values; give a model with MemoryPlus, "
            "ProductKeyMemory or PEER"
        )
    model.requires_grad_(False)
    for table in tables.values():
        table.sparse = True
        table.requires_grad_(True)


def slot_scores(counts_N: Tensor, frequency_N: Tensor | None = None, batches: int = 0) -> Tensor:
    """Score rows by the batch's reads, and by the background's if there is one: ``(N,)`` fp64.

    Args:
        counts_N: how often the batch reads each row, int64.
        frequency_N: in how many background batches each is read, int64.
        batches: number of background batches; a row that all of them read scores zero.
    """
    share_N = counts_N.double() / counts_N.sum().clamp(min=1)
    if frequency_N is None:
        return share_N
    return share_N * torch.log((batches + 1) / (frequency_N.double() + 1))


def best_rows(scores_N: Tensor, rows: int) -> Tensor:
    """Choose the rows of the highest scores, at most ``rows`` and none of score zero: bool."""
    best = scores_N.topk(min(rows, len(scores_N)))
    chosen_N = torch.zeros_like(scores_N, dtype=torch.bool)
    chosen_N[best.indices[best.values > 0]] = True
    return chosen_N


def keep_rows(parameter: nn.Parameter, chosen_N: Tensor) -> None:
    """Drop from a sparse gradient the rows that are not chosen."""
    if parameter.grad is None:
        return
    gradient = parameter.grad.coalesce()
    kept = chosen_N[gradient.indices()[0]]
    parameter.grad = torch.sparse_coo_tensor(
        gradient.indices()[:, kept],
        gradient.values()[kept],
        gradient.shape,
        is_coalesced=True,
        check_invariants=False,
    )


class SparseMemory(Callback):
    """Choose the rows of each step, between its backward pass and the clipping of gradients.

    With accumulated gradients a step's batch is all its micro-batches together. Positions whose
    label is -100 are not counted.

    Args:
        model: frozen but for its tables.
        options: how rows are chosen.
    """

    def __init__(self, model: PreTrainedModel, options: SparseMemoryOptions) -> None:
        self.options = options
        self.background: Background | None = None
        self._tables = memory_tables(model)
        self._counter = SlotCounter(self._tables)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the background, while the weights are still those that the run begins with.

        Raises:
            InputError: it is of another model; or there are several processes.
        """
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise InputError(
                "sparse_memory: the rows of a batch that several processes share are not chosen "
                "together; set trainer.devices to 1"
            )
        if self.options.background is not None:
            assert isinstance(pl_module.model, PreTrainedModel)
            self.background = Background.load(Path(self.options.background), pl_module.model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the tables."""
        self._counter.reset()
        self._counter.attach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._counter.detach()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count what the batch reads; batch norms of queries stay as they were trained."""
        for module in pl_module.modules():
            if isinstance(module, QueryNetwork):
                module.eval()
        self._counter.start(batch["labels"] != IGNORED)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Stop counting."""
        self._counter.pause()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Choose the rows of each table and drop the gradients of the others."""
        for name, table in self._tables.items():
            for parameter in table.parameters():
                keep_rows(parameter, self._chosen(name))
        self._counter.reset()

    def _chosen(self, name: str) -> Tensor:
        counts_N = self._counter.counts[name]
        if self.background is None:
            return best_rows(slot_scores(counts_N), self.options.rows)
        frequency_N = self.background.frequency[name].to(counts_N.device)
        scores_N = slot_scores(counts_N, frequency_N, self.background.batches)
        return best_rows(scores_N, self.options.rows)
