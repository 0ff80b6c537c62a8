"""Protocols of the module that Lightning trains, one for each part of a run that reads it.

Each protocol lists what one consumer reads, so that no part of a run imports the module itself.
:class:`moezoo_train.run.module.LanguageModel` has all of it, which mypy checks there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

    from moezoo_models.model.initialization import DeferredInit
    from moezoo_models.text.tokenizer import Tokenizer
    from moezoo_train.optim.optimizer import OptimizerConfig


class JudgesSteps(Protocol):
    """The guard that decides which steps update the model.

    Attributes:
        skipped: number of steps that did not.
        taken: whether the last step did.
    """

    skipped: int
    taken: bool

    @property
    def on_nan(self) -> str:
        """The action at a loss or gradient that is not finite: ``stop`` or ``skip``."""

    @property
    def spikes(self) -> object | None:
        """Which finite steps are skipped; None: none."""


class TrainsPart(Protocol):
    """Which part of a model is trained beside the rest, which is frozen."""

    @property
    def lora(self) -> object | None:
        """Options of adapters; None: none."""

    @property
    def neurons(self) -> object | None:
        """Options of slices of neurons; None: none."""

    @property
    def sparse_memory(self) -> object | None:
        """Options of rows of tables; None: none."""


class HasModel(Protocol):
    """A module that trains a language model."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, without what training adds."""


class Parallelized(HasModel, Protocol):
    """A module that a strategy parallelizes, or refuses to."""

    @property
    def deferred_init(self) -> DeferredInit | None:
        """The deferred initialization; None if parameters are initialized."""

    @property
    def part(self) -> TrainsPart:
        """Which part of the model is trained."""

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """How parameters are updated."""

    @property
    def guard(self) -> JudgesSteps:
        """The guard that judges the steps."""

    @property
    def compile_model(self) -> bool:
        """Whether torch.compile is asked for."""

    @property
    def trainer(self) -> Trainer:
        """Lightning's trainer."""


class Measured(HasModel, Protocol):
    """A module as metrics and the report read it."""

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's whole gradient before clipping."""

    @property
    def clip_group_norms(self) -> dict[str, float]:
        """The same for clip groups that layers have set apart."""

    @property
    def guard(self) -> JudgesSteps:
        """The guard that counts the skipped steps."""


class TakesHashTables(HasModel, Protocol):
    """A module whose hash tables are built when training starts."""

    @property
    def hash_embeddings_from(self) -> str | None:
        """Directory of the trained model whose embeddings they follow."""


class Savable(Protocol):
    """A module that writes the model directory."""

    def save(self, path: Path, tokenizer: Tokenizer | None) -> None:
        """Write the model and its tokenizer; all processes call this."""
