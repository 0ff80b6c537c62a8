"""What the table and the picture say of given results."""

import csv
import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from moezoo_train.experiments.common.options import ModelOptions, TextOptions
from moezoo_train.experiments.common.palette import BLUE, GREY
from moezoo_train.experiments.common.statistics import mean
from moezoo_train.experiments.compare import peak_memory
from moezoo_train.experiments.compare.curves import Curve, Point, curves_csv, parse_curves
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.figure import losses
from moezoo_train.experiments.compare.panels import compute, load, parameters, spread
from moezoo_train.experiments.compare.peak_memory import PeakMemory
from moezoo_train.experiments.compare.report import write_report
from moezoo_train.experiments.compare.results import Row, aggregate, loads, parse_row
from moezoo_train.experiments.compare.row_colors import colors, families
from moezoo_train.experiments.compare.runs import Run, plan
from moezoo_train.experiments.compare.settings import Experiment, parse_methods
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig

EXPERIMENT = Experiment(
    methods=parse_methods(
        {"dense_mlp": {}, "mixtral": {}, "peer": {"layers": 1}, "expert_choice": {}, "hash": {}}
    ),
    baseline="dense_mlp",
    layers="all",
    ablation=True,
    seeds=(0, 1),
    max_steps=200,
    tolerance=0.05,
    model=ModelOptions(num_layers=2),
    text=TextOptions(),
    optimizer=OptimizerConfig(),
    schedule=ScheduleConfig(),
    precision="32-true",
)
LOSSES = {
    "dense_mlp-0": 4.0, "dense_mlp-1": 4.2,
    "mixtral-0": 3.7, "mixtral-1": 3.9, "mixtral-random-0": 4.0, "mixtral-random-1": 4.4,
    "peer-0": 4.3, "peer-1": 4.3, "peer-random-0": 4.2, "peer-random-1": 4.2,
    "expert_choice-0": 3.5, "expert_choice-1": 3.5,
    "expert_choice-random-0": 3.6, "expert_choice-random-1": 3.6,
}  # fmt: skip


def result(run: Run) -> RunResult:
    common = RunResult(run=run.folder, hash="", identity={})
    if run.folder not in LOSSES:
        return replace(common, failure="loss nan")
    return replace(
        common,
        val_loss=LOSSES[run.folder],
        bits_per_byte=LOSSES[run.folder] / 2,
        tokens=1000,
        seconds=0.5 + run.seed / 2,
        total_parameters=2_500_000,
        active_parameters=919_000,
        evenness=0.5 + run.seed / 10 if run.row != "dense_mlp" else None,
        busiest=2.0 + run.seed if run.row != "dense_mlp" else None,
        usage=0.25 + run.seed / 2 if run.row != "dense_mlp" else None,
        peak_memory=800_000_000 + 1_000_000 * run.seed if run.row == "mixtral" else None,
        unevenness=0.5 if run.row != "dense_mlp" else None,
        environment={
            "device": "abacus", "threads": 2, "precision": "32-true", "torch": "9", "python": "3",
        },
    )  # fmt: skip


@pytest.fixture
def results() -> list[tuple[Run, RunResult]]:
    return [(run, result(run)) for run in plan(EXPERIMENT)]


@pytest.fixture
def rows(results) -> list[Row]:
    return aggregate(results)


def test_means_have_standard_errors():
    found = mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3)
    deviation = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    assert found.error == pytest.approx(deviation / math.sqrt(3))
    assert str(found) == "2.333 ± 0.882"
    assert str(mean([2.0])) == "2.000"
    assert mean([]) is None


def test_rows_are_sorted_and_the_gain_is_paired_by_seed(rows):
    assert [r.name for r in rows] == ["expert_choice", "mixtral", "dense_mlp", "peer", "hash"]
    mixtral = rows[1]
    assert mixtral.loss.value == pytest.approx(3.8)
    assert mixtral.random_loss.value == pytest.approx(4.2)
    # Differences 0.3 and 0.5: their error is smaller than that of either loss.
    assert mixtral.gain.value == pytest.approx(0.4)
    assert mixtral.gain.error == pytest.approx(0.1)
    assert mixtral.random_loss.error == pytest.approx(0.2)
    assert mixtral.tokens_per_second == pytest.approx((2000 + 1000) / 2)
    assert mixtral.evenness == pytest.approx(0.55)
    assert mixtral.busiest == 3.0
    assert rows[2].random_loss is None
    assert rows[2].gain is None


def test_a_seed_whose_partner_failed_pairs_with_nothing(results):
    kept = [(run, r) for run, r in results if run.folder != "mixtral-1"]
    (mixtral,) = (row for row in aggregate(kept) if row.name == "mixtral")
    assert mixtral.gain.count == 1
    assert mixtral.gain.value == pytest.approx(0.3)
    assert mixtral.random_loss.count == 2


def test_the_table_says_all_and_hides_nothing(rows, results, tmp_path, capsys):
    files = write_report(tmp_path, "Title", EXPERIMENT, rows, [r for _, r in results])
    assert files == [
        "table.md", "results.csv", "results.json", "curves.csv", "config.yaml", "loss.png",
        "loss.svg", "parameters.png", "parameters.svg", "load.png", "load.svg", "index.html",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    text = (tmp_path / "table.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Title"
    assert lines[5] == (
        "| mixtral | all | d_expert 169 | 3.800 ± 0.100 | 1.900 ± 0.050 | 4.200 ± 0.200 "
        "| +0.400 ± 0.100 | 2.50 M | 919 k | 0.998 | 1,500 | 0.55 | 3.0 | 50.0 % | 0.50 | 801 MB |"
    )
    assert lines[4].startswith("| expert_choice (not causal) | all |")
    assert lines[6].startswith("| dense_mlp | all | d_ff 512 | 4.100 ± 0.100 | 2.050 ± 0.050 | – |")
    assert lines[7].startswith("| peer | 1 | top_k 24 | 4.300 ± 0.000 |")
    assert "| −0.100 ± 0.000 |" in lines[7]
    assert lines[8].startswith("| hash | all | d_expert 512 | failed | – |")
    assert "Not better than its own random routing: peer." in text
    assert "Not causal, its loss compares with no other: expert_choice" in text
    assert "Failed: hash, random routing, seed 1: loss nan" in text
    assert "2 blocks of width 128, 409,600 tokens of stdlib" in text
    assert "abacus, 2 threads" in text
    printed = capsys.readouterr().out
    assert "801 MB" not in printed
    assert "3.800 ± 0.100" in printed
    assert "Not better than its own random routing: peer." in printed


def test_csv_and_json_hold_the_numbers(rows, results, tmp_path, capsys):
    write_report(tmp_path, "Title", EXPERIMENT, rows, [r for _, r in results])
    with (tmp_path / "results.csv").open() as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert float(table["mixtral"]["gain_error"]) == pytest.approx(0.1)
    assert table["mixtral"]["width_value"] == "169"
    assert table["dense_mlp"]["gain"] == ""
    assert float(table["mixtral"]["usage"]) == pytest.approx(0.5)
    assert table["dense_mlp"]["unevenness"] == ""
    assert "loss nan" in table["hash"]["failures"]
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["experiment"]["methods"]["peer"]["layers"] == 1
    assert {run["run"] for run in whole["runs"]} == {run.folder for run, _ in results}
    assert whole["rows"][1]["gain"]["value"] == pytest.approx(0.4)


def test_a_run_that_is_not_trained_yet_did_not_fail(results, tmp_path, capsys):
    kept = [(run, r) for run, r in results if run.row == "mixtral" and run.random]
    write_report(
        tmp_path,
        "T",
        EXPERIMENT,
        aggregate(kept),
        [r for _, r in kept],
        missing=["mixtral, seed 0"],
    )
    text = (tmp_path / "table.md").read_text()
    assert "| mixtral | all | d_expert 169 | – | – | 4.200 ± 0.200 |" in text
    assert "Not trained yet: mixtral, seed 0." in text


def test_without_any_result_there_is_no_picture(results, tmp_path, capsys):
    failed = [(run, r) for run, r in results if run.row == "hash"]
    files = write_report(tmp_path, "T", EXPERIMENT, aggregate(failed), [r for _, r in failed])
    assert files == [
        "table.md", "results.csv", "results.json", "curves.csv", "config.yaml", "index.html"
    ]  # fmt: skip
    assert "failed" in capsys.readouterr().out


def test_the_picture_shows_each_method_and_its_ablation(rows):
    figure = losses(rows, "dense_mlp", "caption")
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["expert_choice †", "mixtral", "dense_mlp", "peer"]
    random, own = (container.lines[0].get_xdata().tolist() for container in axes.containers)
    assert own == pytest.approx([3.5, 3.8, 4.1, 4.3])
    assert random == pytest.approx([3.6, 4.2, 4.2])
    assert figure.get_supxlabel() == "caption † not causal."
    baseline = [line for line in axes.lines if line.get_label() == "dense_mlp, the baseline"]
    assert baseline[0].get_xdata()[0] == pytest.approx(4.1)


def test_loads_have_errors_and_leave_the_ablations_out(rows, results):
    found = loads(rows, [r for _, r in results])
    assert set(found) == {"mixtral", "peer", "expert_choice"}
    assert found["mixtral"]["evenness"].value == pytest.approx(0.55)
    assert found["mixtral"]["evenness"].error == pytest.approx(0.05)
    assert found["mixtral"]["busiest"].count == 2


def test_rows_survive_json(rows):
    assert [parse_row(json.loads(json.dumps(asdict(row)))) for row in rows] == rows


def curves() -> list[Curve]:
    def points(end: float) -> tuple[Point, ...]:
        return tuple(Point(n, 6e9 * n, n / 10, 7 - (7 - end) * n / 20, 0.1) for n in range(1, 21))

    return [
        Curve("mixtral", False, points(3.6)),
        Curve("mixtral", True, points(4.0)),
        Curve("dense_mlp", False, points(3.8)),
        Curve("peer", False, tuple(replace(p, error=None) for p in points(4.1))),
    ]


def test_curves_survive_csv():
    assert parse_curves(curves_csv(curves())) == [
        replace(c, points=tuple(replace(p, loss=pytest.approx(p.loss)) for p in c.points))
        for c in curves()
    ]


def test_each_panel_of_curves_has_method_ablation_and_baseline(rows):
    figure = compute(rows, curves(), "dense_mlp", "caption")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["mixtral", "peer"]
    mixtral, peer = shown
    ends = [line.get_ydata()[-1] for line in mixtral.lines]
    assert ends == pytest.approx([3.8, 4.0, 3.6])  # baseline, ablation, method on top
    assert mixtral.lines[1].get_linestyle() == "--"
    assert mixtral.lines[2].get_xdata()[-1] == pytest.approx(120)
    assert "10⁹ FLOPs" in figure.get_supxlabel()
    assert (len(mixtral.collections), len(peer.collections)) == (3, 1)  # bands of errors
    # The last three quarters fill the panel.
    assert mixtral.get_ylim()[1] == pytest.approx(7 - (7 - 4.1) / 4, rel=0.05)


def test_the_other_pictures_hold_every_number(rows, results):
    (axes,) = parameters(rows, "dense_mlp", "caption").axes
    dots = [container.lines[0].get_ydata()[0] for container in axes.containers]
    assert dots == pytest.approx([3.5, 3.8, 4.1, 4.3])
    sizes = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert sizes == [row.total_parameters for row in rows if row.loss]
    assert [text.get_text() for text in axes.texts] == [
        "expert_choice (not causal)", "mixtral", "dense_mlp", "peer"
    ]  # fmt: skip
    figure = load(rows, loads(rows, [r for _, r in results]), "dense_mlp", "caption")
    assert len(figure.axes) == 4
    busiest = [container.lines[0].get_xdata()[0] for container in figure.axes[2].containers]
    assert busiest == pytest.approx([2.5, 2.5, 2.5])


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1, 2, 2.1, 2.2, 9], [9.9, 10, 10], [5]])
def test_labels_are_spread_and_stay_inside(values):
    found = spread(values, 1.0, 0.0, 10.0)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(found))
    assert all(-1e-9 <= place <= 10 + 1e-9 for place in found)
    assert len(found) == len(values)


def test_labels_that_have_room_stay_where_they_are():
    assert spread([1.0, 3.0, 7.5], 1.0, 0.0, 10.0) == [1.0, 3.0, 7.5]
    assert spread([4.0, 4.0], 1.0, 0.0, 10.0) == [3.5, 4.5]


def test_colours_are_one_each_for_few_and_one_per_family_for_many(rows):
    few = colors(rows, "dense_mlp")
    assert len(set(few.values())) == len(rows)
    many = [replace(rows[1], name=f"row_{n}") for n in range(9)]
    assert set(colors(many, "row_0").values()) == {GREY, BLUE}
    assert families(rows, rows, "dense_mlp") == {}
    assert families(many, many[1:], "row_0") == {"experts": BLUE}
    (legend,) = parameters(many, "row_0", "caption").legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["experts", "row_0, the baseline"]


def test_the_peak_is_that_of_the_block_alone():
    with PeakMemory() as large:
        block = torch.ones(60_000_000, device="cuda" if torch.cuda.is_available() else "cpu")
    del block
    with PeakMemory() as small:
        pass
    if large.peak is None or small.peak is None:
        pytest.skip("this system does not say how much memory is held")
    assert large.peak - small.peak > 150e6


def test_where_the_mark_cannot_be_reset_only_a_new_record_counts(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(peak_memory, "_reset_resident_peak", lambda: False)
    records = iter([100, 100, 100, 250])
    monkeypatch.setattr(peak_memory, "_largest_ever", lambda: next(records))
    with PeakMemory() as lower:
        pass
    with PeakMemory() as record:
        pass
    assert (lower.peak, record.peak) == (None, 250)
