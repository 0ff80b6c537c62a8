"""The report says what happened, and draws it."""

import io
import json
import math
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console

from moezoo import PEER, MemoryPlus
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.measure.expert_load import ExpertLoad, LoadCounter
from moezoo_train.measure.loggers import MetricsCSV, read_metrics
from moezoo_train.measure.report import draw_losses, smoothed, table, write_report
from moezoo_train.measure.throughput import forward_flops_per_token
from moezoo_train.run.callbacks import LastCheckpoint
from moezoo_train.run.module import FFNRule

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


def test_load_of_slots_too_many_to_count_is_a_mean_over_tokens():
    counter = LoadCounter()
    for tokens, usage, top1 in ((30, 0.5, 0.1), (10, 0.1, 0.3)):
        figures = {"usage": usage, "unevenness": 4 * usage, "top1_usage": top1}
        stats = {name: torch.tensor(value) for name, value in figures.items()}
        counter.add(
            ({"context_mass": torch.tensor(0.5)}, {"tokens": torch.tensor(tokens), **stats})
        )
    (load,) = counter.take()
    assert (load.layer, load.max_over_mean, load.entropy, load.dropped) == (1, None, None, None)
    assert load.usage == pytest.approx(0.4)
    assert load.unevenness == pytest.approx(1.6)
    assert load.top1_usage == pytest.approx(0.15)


def test_tokens_without_an_expert_are_a_mean_over_tokens():
    counter = LoadCounter()
    for tokens, share in ((30, 0.1), (10, 0.5)):
        stats = {"tokens": torch.tensor(tokens), "without_expert": torch.tensor(share)}
        counter.add(({**stats, "expert_counts": torch.tensor([1, 2])},))
    assert counter.take()[0].without_expert == pytest.approx(0.2)


def test_training_logs_the_usage_of_every_layer_that_chooses(
    make_model, make_trainer, random_tokens, tmp_path
):
    trainer = make_trainer(
        max_steps=2, val_check_interval=2, logger=MetricsCSV(tmp_path / "metrics.csv")
    )
    ffn = partial(PEER, num_experts=68**2, num_heads=2, top_k=2)
    model = make_model(ffn=ffn, ffn_rules=[FFNRule([1], partial(MemoryPlus, num_keys=6, top_k=2))])
    trainer.fit(model, random_tokens)
    rows = read_metrics(tmp_path / "metrics.csv")
    logged = {name for row in rows for name in row}
    for name in (
        "usage/layer_00",
        "unevenness/layer_00",
        "top1_usage/layer_01",
        "entropy/layer_01",
    ):
        assert f"experts/{name}" in logged
    assert "experts/entropy/layer_00" not in logged  # 4624 experts are not counted
    report = write_report(
        tmp_path, trainer, model, console=(console := Console(file=io.StringIO()))
    )
    peer, memory = report.expert_load
    assert 0 < peer.usage < 0.1  # 4 batches of 48 tokens with 4 choices, of 4624
    assert f"usage {peer.usage:.1%} per batch, unevenness {peer.unevenness:.2f} nats" in (
        " ".join(console.file.getvalue().split())
    )
    assert memory.max_over_mean >= 1


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
    assert saved["trained_parameters"] == saved["total_parameters"]
    assert "trained" not in text


@pytest.mark.parametrize("every", [10, 2, 0])
def test_a_short_run_has_both_losses(every, make_model, make_trainer, random_tokens, tmp_path):
    losses = []
    watch = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(
            float(outputs["lm_loss"])
        )
    )
    trainer = make_trainer(
        max_steps=3,
        log_every_n_steps=every,
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        callbacks=[watch],
    )
    model = make_model()
    trainer.fit(model, random_tokens)
    console = Console(file=io.StringIO())
    report = write_report(tmp_path, trainer, model, console=console)
    rows = read_metrics(tmp_path / "metrics.csv")
    last = [row for row in rows if row["step"] == "3"]
    assert [("train/loss" in row, "val/loss" in row) for row in last] == [
        (True, False),
        (False, True),
    ]
    since = losses[2:] if every == 2 else losses
    assert float(last[0]["train/loss"]) == pytest.approx(sum(since) / len(since))
    assert report.train_loss == pytest.approx(sum(since) / len(since))
    assert report.val_loss == pytest.approx(float(last[1]["val/loss"]))
    assert float(last[0]["tokens"]) == 3 * 4 * 12
    per_token = float(last[0]["train/flops"]) / (3 * 4 * 12)
    assert per_token == pytest.approx(3 * forward_flops_per_token(model.model, 12))
    assert "–" not in console.file.getvalue()


def test_a_single_point_has_a_mark(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "moezoo_train.measure.report.save_figure", lambda path, figure: drawn.append(figure)
    )
    rows = [{"step": str(n), "tokens": str(10 * n), "train/loss": "3.0"} for n in (1, 2)]
    for count in (1, 2):
        draw_losses(tmp_path / "loss.png", rows[:count], "a run")
    marks = [figure.axes[0].lines[1].get_marker() for figure in drawn]
    assert marks == ["s", "None"]


def test_early_stopping_leaves_a_loss_too(make_model, make_trainer, random_tokens, tmp_path):
    class Stop(pl.Callback):
        def on_validation_end(self, trainer, module) -> None:
            trainer.should_stop = True

    trainer = make_trainer(
        max_steps=9,
        val_check_interval=2,
        log_every_n_steps=10,
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        callbacks=[Stop()],
    )
    trainer.fit(make_model(), random_tokens)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], "train/loss" in row) for row in rows] == [("2", False), ("2", True)]


def test_the_rows_of_a_step_are_written_before_its_checkpoint(
    make_model, make_trainer, random_tokens, tmp_path
):
    """Killed right after, the run would go on behind the step; what others log has its number."""
    written = []

    class Watch(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
            rows = read_metrics(tmp_path / "metrics.csv")
            written.append((checkpoint["global_step"], [r["step"] for r in rows if "tokens" in r]))

    class Other(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            module.log("other", float(trainer.global_step), on_step=True)

    trainer = make_trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        enable_checkpointing=True,
        callbacks=[LastCheckpoint(tmp_path / "checkpoints", 4), Other()],
        plugins=[Watch()],
    )
    trainer.fit(make_model(), random_tokens)
    # The last step is validated, too.
    assert written == [(4, ["2", "4"]), (6, ["2", "4", "6", "6"])]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(r["step"], r["other"]) for r in rows if "other" in r] == [(n, n) for n in "246"]


def test_every_zero_steps_is_the_last_alone(make_model, make_trainer, random_tokens, tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    make_trainer(max_steps=2, log_every_n_steps=0, logger=logger).fit(make_model(), random_tokens)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], "train/loss" in row) for row in rows] == [("2", True), ("2", False)]


def test_table_shows_what_is_missing_as_missing():
    report = SimpleNamespace(
        train_loss=None, val_loss=None, val_bits_per_byte=None, val_perplexity=None, steps=1,
        tokens=2, tokens_per_second=3.0, mfu=0.5, peak_flops=(2e9, "data sheet"), train_seconds=4.0,
        total_parameters=10_000, active_parameters=10, trained_parameters=125, skipped_steps=3,
        sources=[],
        expert_load=[
            ExpertLoad(2, 1.5, 0.75, 0.5, 0.25, usage=1.0, unevenness=0.1),
            ExpertLoad(3, 1.5, 0.75, None, None, usage=0.5, unevenness=0.1, top1_usage=0.25),
            ExpertLoad(4, None, None, None, None, usage=1.0, unevenness=0.123),
            ExpertLoad(5, 1.5, 0.75, None, None, without_expert=0.125, usage=1.0),
        ],
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    console.print(table(report, "run"))
    text = console.file.getvalue()
    assert "val loss" in text
    assert "–" in text
    assert "50% of 2 GFLOP/s (data sheet)" in text
    assert "125 (1.25% of all)" in text
    assert "skipped steps" in text
    assert "busiest 1.50 × mean, evenness 0.750, 25.0% dropped" in text
    assert "0.750, usage 50.0% (best 25.0%) per batch" in text
    assert "evenness 0.750, 12.5% of tokens without an expert" in text
    assert "layer 4 │ usage 100.0% per batch, unevenness 0.12 nats" in " ".join(text.split())


def test_losses_that_are_not_finite_are_left_out_of_the_picture(tmp_path):
    rows = [
        {"step": str(n), "tokens": str(n * 1000), "train/loss": "nan" if n == 3 else str(9 - n)}
        for n in range(1, 7)
    ]
    draw_losses(tmp_path / "loss.png", rows, "run")
    assert (tmp_path / "loss.png").stat().st_size > 5000
