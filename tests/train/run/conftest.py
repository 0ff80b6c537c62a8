"""Short runs of `moezoo fit` on a small corpus, as several tests of runs make them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moezoo_train.run.cli import run

ShortRun = Callable[..., Path]


def short_runs(folder: Path, warmup_steps: int) -> ShortRun:
    """Return a function that trains four steps on the corpus in a folder, and gives the run's.

    Args:
        folder: holds the documents in ``corpus``, and gets the runs.
        warmup_steps: of the schedule.
    """

    def fit(name: str, model: dict[str, Any], options: dict[str, Any]) -> Path:
        recipe = {
            "output": str(folder / name),
            "loggers": ["csv"],
            "sample_tokens": 0,
            "checkpoint_every": 2,
            "model": {
                "d_model": 16,
                "num_layers": 2,
                "num_heads": 2,
                "schedule": {"warmup_steps": warmup_steps, "total_steps": 4},
                **model,
            },
            "data": {
                "source": str(folder / "corpus"),
                "data_dir": str(folder / "data"),
                "vocab_size": 300,
                "sequence_length": 16,
                "batch_size": 2,
                "val_fraction": 0.1,
            },
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
            },
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        run(["fit", "--config", str(path), *(f"--{k}={v}" for k, v in options.items())])
        return folder / name

    return fit


@pytest.fixture(scope="session")
def make_short_runs() -> Callable[[Path, int], ShortRun]:
    """Return what makes the function that trains in a folder."""
    return short_runs
