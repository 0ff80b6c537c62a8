"""The report says what happened, and draws it."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from moezoo_train.loggers import MetricsCSV
from moezoo_train.metrics import ExpertLoad, LoadCounter
from moezoo_train.report import draw_losses, smoothed, table, write_report

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def stats(counts: list[int], entropy: float = 1.0, dropped: int = 0) -> dict[str, torch.Tensor]:
    return {
        "expert_counts": torch.tensor(counts),
        "tokens": torch.tensor(sum(counts)),
        "router_entropy": torch.tensor(entropy),
        "dropped": torch.tensor(dropped),
    }


def test_expert_load_adds_up_counts_not_ratios():
    counter = LoadCounter()
    counter.add(({}, stats([4, 0, 0, 0], entropy=0.0)))
    counter.add(({}, stats([1, 4, 4, 3], entropy=math.log(4), dropped=2)))
    (load,) = counter.take()
    share = [5 / 16, 4 / 16, 4 / 16, 3 / 16]
    assert load.layer == 1
    assert load.max_over_mean == pytest.approx(5 / 4)
    assert load.entropy == pytest.approx(-sum(p * math.log(p) for p in share) / math.log(4))
    assert load.router_entropy == pytest.approx(12 / 16)
    assert load.dropped == pytest.approx(2 / 16)
    assert counter.take() == []


def test_expert_load_of_layers_without_a_learned_router():
    counter = LoadCounter()
    counter.add(({"expert_counts": torch.tensor([8, 0]), "tokens": torch.tensor(8)},))
    assert counter.take() == [ExpertLoad(0, 2.0, 0.0, None, None)]


def test_smoothing_starts_unbiased_and_keeps_constants():
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    falling = smoothed([float(100 - n) for n in range(100)])
    assert falling[0] == 100.0
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(1.0 + 4.0, abs=0.1)  # lags by the averaged points


def test_report_of_a_run(make_model, make_trainer, random_tokens, tmp_path):
    trainer = make_trainer(
        max_steps=6, val_check_interval=3, logger=MetricsCSV(tmp_path / "metrics.csv")
    )
    model = make_model()
    trainer.fit(model, random_tokens)
    console = Console(file=io.StringIO(), width=100)
    report = write_report(tmp_path, trainer, model, console=console)

    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["steps"] == report.steps == 6
    assert saved["tokens"] == 6 * 4 * 12
    assert saved["val_loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert saved["val_bits_per_byte"] == pytest.approx(saved["val_loss"] / math.log(2) / 3.0)
    assert saved["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert saved["active_parameters"] < saved["total_parameters"]
    assert [load["layer"] for load in saved["expert_load"]] == [0, 1]
    assert saved["tokens_per_second"] == pytest.approx(saved["tokens"] / saved["train_seconds"])
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    losses = [float(row.split(",")[names.index("train/loss")] or "nan") for row in rows[1:]]
    logged = [loss for loss in losses if not math.isnan(loss)]
    assert len(logged) == 6
    assert saved["train_loss"] == logged[-1]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "sample.txt").exists()  # there is no model/ to write one

    text = console.file.getvalue()
    assert f"{saved['val_loss']:.3f} nats/token" in text
    assert "experts of layer 1" in text


def test_table_shows_what_is_missing_as_missing():
    report = SimpleNamespace(
        train_loss=None, val_loss=None, val_bits_per_byte=None, val_perplexity=None, steps=1,
        tokens=2, tokens_per_second=3.0, mfu=0.5, peak_flops=(2e9, "data sheet"), train_seconds=4.0,
        total_parameters=10_000, active_parameters=10, skipped_steps=3,
        expert_load=[ExpertLoad(2, 1.5, 0.75, 0.5, 0.25)],
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    console.print(table(report, "run"))
    text = console.file.getvalue()
    assert "val loss" in text
    assert "–" in text
    assert "50% of 2 GFLOP/s (data sheet)" in text
    assert "skipped steps" in text
    assert "busiest 1.50 × mean, evenness 0.750, 25.0% dropped" in text


def test_losses_that_are_not_finite_are_left_out_of_the_picture(tmp_path):
    rows = [
        {"step": str(n), "tokens": str(n * 1000), "train/loss": "nan" if n == 3 else str(9 - n)}
        for n in range(1, 7)
    ]
    draw_losses(tmp_path / "loss.png", rows, "run")
    assert (tmp_path / "loss.png").stat().st_size > 5000
