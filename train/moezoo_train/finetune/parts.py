"""Which part of the model that a run begins with is trained: adapters, neurons, rows, or all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from moezoo_train.checkpoint_structure import check_same
from moezoo_train.finetune import sparse_memory as rows
from moezoo_train.finetune.lora import (
    LoRAOptions,
    add_adapters,
    check_lora,
    describe_adapters,
    of_adapter,
)
from moezoo_train.finetune.neurons import (
    NeuronOptions,
    check_neurons,
    describe_neurons,
    of_slice,
    slice_neurons,
)
from moezoo_train.optim.optimizer import OptimizerConfig


def is_added(name: str) -> bool:
    """Return whether a tensor is of an adapter or a slice of neurons, not one of the model's own.

    Args:
        name: in the model's state dictionary.
    """
    return of_adapter(name) or of_slice(name)


@dataclass(frozen=True)
class TrainedPart:
    """What is trained of a model; with none of the options, all of it.

    Attributes:
        lora: low-rank adapters.
        neurons: slices of some neurons.
        sparse_memory: rows of tables.
    """

    lora: LoRAOptions | None = None
    neurons: NeuronOptions | None = None
    sparse_memory: rows.SparseMemoryOptions | None = None
    _rows: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        # What is in the background's file now: it may change while the run goes on.
        self._rows.update(rows.describe_sparse_memory(self.sparse_memory))

    @property
    def added(self) -> bool:
        """Whether all weights stay, so that checkpoints need only what is added to them."""
        return self.lora is not None or self.neurons is not None

    def check(self, base: str | None, optimizer: OptimizerConfig, compiled: bool) -> None:
        """Refuse options that do not go with each other.

        Raises:
            InputError: names the option to change.
        """
        check_lora(self.lora, base, optimizer, compiled)
        others = {"lora": self.lora, "sparse_memory": self.sparse_memory}
        check_neurons(self.neurons, base, others, optimizer, compiled)
        rows.check_sparse_memory(self.sparse_memory, base, self.lora, optimizer, compiled)

    def prepare(self, model: PreTrainedModel, base: str) -> None:
        """Freeze what is not trained, and add what is; in place.

        Args:
            model: as it was loaded.
            base: from which directory.

        Raises:
            InputError: the model lacks what is to be trained.
        """
        if self.lora is not None:
            add_adapters(model, self.lora, base)
        if self.neurons is not None:
            slice_neurons(model, self.neurons, base)
        if self.sparse_memory is not None:
            rows.freeze_all_but_tables(model, base)

    def describe(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Describe it for a checkpoint, by option."""
        return {
            "lora": describe_adapters(model, self.lora),
            "neurons": describe_neurons(model, self.neurons),
            "sparse_memory": self._rows,
        }

    def check_saved(self, saved: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Compare with what a checkpoint was trained as.

        Raises:
            InputError: names what differs.
        """
        for name, described in self.describe(model).items():
            check_same(name, saved.get(name, {}), described)
