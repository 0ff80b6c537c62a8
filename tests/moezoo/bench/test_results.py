"""What becomes of measurements: ratios, verdicts, tables, files, pictures."""

import csv
import dataclasses
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from moezoo.bench import environment, pictures
from moezoo.bench import results as R
from moezoo.bench.case import Target, Work
from moezoo.bench.cases import CASES
from moezoo.bench.runner import LIMIT, Measured, Result
from moezoo.bench.timing import Timing
from moezoo.command import bench as command

PEER = next(case for case in CASES if case.name == "peer-256")


def times(seconds: float, samples: int = 10) -> Timing:
    return Timing((seconds,) * samples)


def result(**changes) -> Result:
    """Ours takes 0.1 and 0.4 s, PEER-pytorch 0.3 and 2 s."""
    values = {
        "case": PEER,
        "setting": PEER.setting(False, None),
        "work": (Work(1e9, 1e8, 1e7), Work(3e9, 2e8, 1e8)),
        "peer": "PEER-pytorch",
        "outcome": "measured",
        "error": 1e-7,
        "ours": Measured(times(0.1), times(0.4), 100, 300),
        "theirs": Measured(times(0.3, 8), times(2.0, 5), 400, 500),
    }
    return Result(**{**values, **changes})


def test_a_row_by_hand(limits):
    row = R.row(result(), limits)
    assert (row.forward_ratio, row.step_ratio) == (pytest.approx(3), pytest.approx(5))
    assert row.backward_ratio == pytest.approx(1.7 / 0.3)
    assert (row.saved_ratio, row.memory_ratio) == (0.25, 0.6)
    # 1e8 bytes at 5 GB/s and 1e7 at 1 GB/s are 30 ms; 1e9 FLOPs at 1e11 would be 10.
    assert row.of_limit == pytest.approx(0.3)
    assert row.step_of_limit == pytest.approx(0.14 / 0.4)
    assert (row.forward_ms, row.peer_step_ms) == (pytest.approx(100), pytest.approx(2000))
    assert (row.forward_runs, row.peer_forward_runs, row.peer_step_runs) == (10, 8, 5)
    assert row.shape == "T2048 d512 h8 k16 n256"
    assert row.target == "forward ≥ 3.5×, fwd+bwd ≥ 3×, memory ≤ 0.3×"
    assert row.verdict == "forward misses by 15 %; memory misses by 100 %"
    assert R.cells(row)[-1] == f"{row.verdict} (5 samples)"
    assert R.row(result(), limits, judged=False).verdict == "agrees"


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target(forward=3.0, step=5.0), "met"),
        (Target(forward=6.0), "forward misses by 50 %"),
        (Target(forward=3.0001), "forward misses by 1 %"),  # never "by 0 %"
        (Target(saved=0.2), "saved misses by 25 %"),
        (Target(backward=5.0, memory=0.6), "met"),
        (Target(of_limit=0.6), "of limit misses by 50 %"),
        (None, "agrees"),
    ],
)
def test_verdicts(limits, target, verdict):
    row = dataclasses.replace(R.row(result(), limits), verdict="")
    exact = dataclasses.replace(row, forward_ratio=3.0, step_ratio=5.0, of_limit=0.3)
    assert R.verdict(exact, target) == verdict


def test_a_row_without_times_says_why(limits):
    nothing = {"ours": None, "theirs": None, "error": None}
    missing = R.row(result(outcome="missing", note="not installed; pip", **nothing), limits)
    assert missing.verdict == "not installed; pip"
    failed = R.row(result(outcome="failed", note="TypeError: no", **nothing), limits)
    assert failed.verdict == "fails: TypeError: no"
    differs = R.row(
        result(outcome="differs", note="differs by 1", **{**nothing, "error": 1.0}), limits
    )
    assert (differs.verdict, differs.forward_ratio, differs.error) == ("differs by 1", None, 1.0)
    lost = R.verdict(R.row(result(theirs=None), limits), Target(forward=2.0))
    assert lost == "forward was not measured"


def test_csv_and_json_hold_all_rows_and_their_origin(limits, results, where, tmp_path):
    rows = [R.row(one, limits) for one in results]
    R.write(tmp_path, rows, limits, where)
    assert R.read(tmp_path) == (rows, limits, where)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["environment"] == where
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert (line["machine"], line["torch"], line["date"]) == (
            where["device"],
            where["torch"],
            where["date"],
        )
        assert (line["case"], line["peer"]) == (row.case, row.peer)
        assert line["step_ratio"] == ("" if row.step_ratio is None else str(row.step_ratio))
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.json"}


def test_the_report_names_every_case_and_the_machine(limits, results, where, capsys):
    rows = [R.row(one, limits) for one in results]
    command.report(rows, limits, where)
    text = capsys.readouterr().out
    for row in rows:
        assert row.title in text
        assert row.shape in text
    assert "(dense)" in text
    assert "5.0 GB/s read" in text
    assert "a processor, threads: 2, torch 2.13.0" in text
    assert " ms " not in text.splitlines()[1]  # absolute times of a shared CPU mean nothing
    on_gpu = [dataclasses.replace(rows[0], device="cuda", forward_ms=1.5)]
    command.report(on_gpu, limits, where)
    assert "1.5" in capsys.readouterr().out


def test_pictures(limits, results, where, tmp_path):
    rows = [R.row(one, limits) for one in results]
    paths = pictures.draw(tmp_path, rows, limits, where)
    names = [
        f"{name}.{kind}" for name in ("ratios", "roofline", "sizes") for kind in ("svg", "png")
    ]
    assert [path.name for path in paths] == names
    for path in paths[1::2]:
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert 0.02 < (pixels < 0.9).any(axis=-1).mean() < 0.7


def test_equal_results_give_equal_pictures(limits, where, tmp_path):
    rows = [R.row(result(), limits)]
    one, other = (pictures.draw(tmp_path / name, rows, limits, where) for name in "ab")
    assert [path.name for path in one] == [path.name for path in other]
    for path, same in zip(one, other, strict=True):
        assert path.read_bytes() == same.read_bytes()


def test_bars_end_at_the_ratios_and_show_the_targets(limits, results):
    rows = [R.row(one, limits) for one in results if one.peer != LIMIT]
    (axes,) = pictures.ratios(rows).axes
    bars = [bar.get_x() + bar.get_width() for bar in axes.patches if bar.get_height() < 0.9]
    wanted = [r for row in rows for r in (row.forward_ratio, row.step_ratio) if r is not None]
    assert bars == pytest.approx(wanted)
    marks = {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
    assert {row.target_forward for row in rows if row.target_forward} <= marks
    assert {row.target_step for row in rows if row.target_step} <= marks


@pytest.mark.parametrize("target", [0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 1.0, 1.1, 1.25, 1.5, 2.0])
def test_numbers_stand_beside_bars_and_marks(limits, target):
    """However near a mark is to its bar's end, on either side of 1."""
    base = R.row(result(), limits)
    rows = [
        dataclasses.replace(
            base,
            case=f"case-{number}",
            forward_ratio=ratio,
            step_ratio=0.986 * ratio,
            target_forward=target * ratio,
            target_step=target * 0.986 * ratio,
        )
        for number, ratio in enumerate((0.0123, 0.086, 0.2, 0.858, 0.986, 1.0, 1.02, 3.6, 45.9))
    ]
    figure = pictures.ratios(rows)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    numbers = [text.get_window_extent() for text in axes.texts]
    assert len(numbers) == 2 * len(rows)
    marks = [line.get_window_extent() for line in axes.lines if line.get_color() == pictures._RED]
    bars = [bar.get_window_extent() for bar in axes.patches if 0 < bar.get_height() < 0.9]
    for number in numbers:
        assert axes.bbox.x0 < number.x0
        assert number.x1 < axes.bbox.x1
        for other in (*marks, *bars):
            if number.y0 < (other.y0 + other.y1) / 2 < number.y1:
                assert number.x1 < other.x0 or other.x1 < number.x0


def test_a_quick_run_says_so_on_table_and_pictures(limits, results, where, tmp_path, capsys):
    rows = [R.row(one, limits) for one in results]
    for name, quick in (("quick", True), ("whole", False)):
        here = {**where, "quick": quick}
        (tmp_path / name).mkdir()
        pictures.draw(tmp_path / name, rows, limits, here)
        command.report(rows, limits, here)
        text = capsys.readouterr().out
        assert text.startswith(f"{R.QUICK}\n") is quick
        assert text.endswith(f"{R.QUICK}\n") is quick
        assert ("ops (quick)" in text) is quick
    for picture in ("ratios", "roofline", "sizes"):
        one, other = (imread(tmp_path / name / f"{picture}.png") for name in ("quick", "whole"))
        red = [
            ((p[..., 0] > 0.7) & (p[..., 1] < 0.5) & (p[..., 2] < 0.2)).sum() for p in (one, other)
        ]
        assert red[0] > red[1] + 1000


def test_the_roofline_shows_achieved_over_intensity(limits):
    row = R.row(result(), limits)
    (axes,) = pictures.roofline([row], limits).axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    intensity = 1e9 / 1.1e8
    assert any(p == (pytest.approx(intensity), pytest.approx(10)) for p in points)  # 1e9 in 0.1 s
    assert any(p == (pytest.approx(intensity), pytest.approx(10 / 3)) for p in points)
    assert any(y == 100 for _, y in points)  # GFLOP/s, fp32


@pytest.mark.parametrize(("low", "high"), [(0.004, 300), (90, 800), (2e3, 4e6)])
def test_logarithmic_axes_have_plain_labels(low, high):
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    pictures._plain_logarithmic(axes.yaxis)
    places = [place for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(places)
    assert len(labels) >= 3
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(places)
    assert not any("e" in label or "$" in label for label in labels)


def test_without_measurements_there_are_no_pictures(limits, where, tmp_path):
    row = R.row(result(outcome="missing", ours=None, theirs=None), limits)
    assert pictures.draw(tmp_path, [row], limits, where) == []
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_machine_versions_and_huge_pages(monkeypatch):
    import torch

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    found = environment.environment(torch.device("cpu"))
    assert found["variables"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    json.dumps(found)
