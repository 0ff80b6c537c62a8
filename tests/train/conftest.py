"""A model and data small enough for a test of training to take a second."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moezoo import SparseMoE
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import LanguageModel

VOCABULARY = 50

# Models this small gain nothing from a second thread, and lose much where the cores are shared.
torch.set_num_threads(1)


class RandomTokens(pl.LightningDataModule):
    """Windows of random tokens, in a fixed order."""

    bytes_per_token = 3.0

    def __init__(self, windows: int = 64) -> None:
        super().__init__()
        self.windows = windows

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.windows, seed=0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(10, seed=1)  # the last batch is smaller

    @staticmethod
    def _loader(windows: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (windows, 13), generator=generator)
        rows = [{"input_ids": row[:-1], "labels": row[1:].clone()} for row in tokens]
        return DataLoader(rows, batch_size=4)


@pytest.fixture
def random_tokens() -> RandomTokens:
    return RandomTokens()


@pytest.fixture
def make_model():
    """Return a function that builds a two-block sparse MoE."""

    def build(**arguments) -> LanguageModel:
        pl.seed_everything(1, verbose=False)
        defaults = {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_length": 32,
            "ffn": partial(SparseMoE, num_experts=4, d_expert=8),
            "optimizer": OptimizerConfig(lr=1e-2),
            "schedule": ScheduleConfig("constant", warmup_steps=2),
        }
        return LanguageModel(**(defaults | arguments))

    return build


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that builds a trainer on one CPU process, quiet and writing nothing."""

    def build(**arguments) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "val_check_interval": 100,
            "check_val_every_n_epoch": None,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**(defaults | arguments))

    return build
