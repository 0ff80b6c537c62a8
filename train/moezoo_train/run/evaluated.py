"""The validation and test loops of a language model."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from moezoo.routing.losses import sum_over_ranks
from moezoo_models.model.head import IGNORED
from moezoo_train.measure.expert_load import precise
from moezoo_train.parallel.distributed import process_count


class EvaluatedModule(LightningModule):
    """A module whose ``forward`` returns a batch's loss, measured over all tokens of all ranks.

    Logs ``val/loss`` or ``test/loss`` in nats per token, the perplexity, and bits per byte where
    the data module says how many bytes a token has.
    """

    _totals: Tensor | None = None

    def on_validation_epoch_start(self) -> None:
        """Start the sums: total loss in nats, tokens."""
        self._totals = precise(torch.zeros(2, device=self.device))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the sums."""
        loss = self(batch).lm_loss
        tokens = (batch["labels"] != IGNORED).sum()
        assert self._totals is not None
        self._totals += torch.stack([precise(loss) * tokens, precise(tokens)])

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte over all tokens of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As for validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self._totals is not None
        total, tokens = self.trainer.strategy.reduce(self._totals, reduce_op="sum").tolist()
        loss = total / max(tokens, 1.0)
        metrics = {f"{stage}/loss": loss, f"{stage}/perplexity": math.exp(min(loss, 700.0))}
        data = getattr(self.trainer, "datamodule", None)
        bytes_per_token = getattr(data, "bytes_per_token", None)
        if bytes_per_token:
            metrics[f"{stage}/bits_per_byte"] = loss / math.log(2) / bytes_per_token
        self.log_dict(metrics)


def share_of_scored(labels: Tensor) -> Tensor:
    """Return how many tokens this process scores, over the mean of all processes.

    Losses times that have as their mean over processes the mean over all tokens.
    """
    scored = (labels != IGNORED).sum()
    return scored * process_count() / sum_over_ranks(scored).clamp(min=1)
