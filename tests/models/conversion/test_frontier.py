"""`moezoo inspect frontier`: every method on the same tokens, one table, one picture."""

import csv
import json

import pytest

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.conversion.sparsify import sparsify
from moezoo_models.inspect.frontier import WAYS, inspect_frontier


def test_every_method_is_measured_as_its_command_does(readable, text, tmp_path, capsys):
    source, output = readable(), tmp_path / "new" / "frontier"
    found = inspect_frontier(source, [0.75, 0.5, 0.3], experts=6, output=output, **text)
    points = {(p.method, p.asked): p for p in found.points}
    # Methods that compute the whole gate cannot do with less than a third.
    assert set(points) == {(m, w) for m in WAYS for w in (0.75, 0.5, 0.3)} - {
        ("cats", 0.3),
        ("chess", 0.3),
    }
    for method in ("mix", "teal"):
        alone = sparsify(source, tmp_path / method, method, 0.5, check="none", **text)
        assert points[method, 0.5].perplexity == pytest.approx(alone.perplexity["sparse"], rel=1e-6)
        assert found.dense == pytest.approx(alone.perplexity["dense"], rel=1e-6)
    for (method, asked), point in points.items():
        off = 1 / 6 if method == "carve" else 0.04
        assert point.work == pytest.approx(asked, abs=off), method
        if method != "griffin":  # judged on the second halves of windows, as is the dense model
            assert point.ratio == pytest.approx(point.perplexity / found.dense, rel=1e-5)
        assert point.error > 0
    assert sorted(path.name for path in output.iterdir()) == [
        "frontier.csv", "frontier.json", "frontier.md", "frontier.png",
    ]  # fmt: skip
    report = json.loads((output / "frontier.json").read_text())
    assert len(report["points"]) == len(points)
    rows = list(csv.DictReader((output / "frontier.csv").read_text().splitlines()))
    assert [float(row["ratio"]) for row in rows] == [p.ratio for p in found.points]
    table = (output / "frontier.md").read_text()
    printed = capsys.readouterr().out
    for point in found.points:
        assert f"{point.ratio:.3f} ± {point.error:.3f}" in table
        assert f"{point.ratio:.3f} ± {point.error:.3f}" in printed
    assert "| cats | " in table
    assert "| – |" in table
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["mixt"]}, "methods: 'mixt' is not known; did you mean 'mix'"),
        ({"works": [1.2]}, "works: 1.2 is out of range"),
        ({"experts": 1}, "experts: 1 is out of range"),
        ({"experts": 7, "methods": ["carve"]}, "experts"),
    ],
)
def test_mistakes_are_named(options, message, readable, text, tmp_path):
    with pytest.raises(InputError, match=message):
        inspect_frontier(readable(), output=tmp_path / "new" / "frontier", **{**text, **options})
    assert not (tmp_path / "new").exists()


def test_the_command_runs(readable, text, tmp_path, capsys):
    options = [f"--{key}={value}" for key, value in text.items()]
    command = ["inspect", "frontier", "--source", str(readable()), "--methods", "[teal]"]
    assert main([*command, "--works", "[0.5]", f"--output={tmp_path / 'f'}", *options]) == 0
    assert "teal" in capsys.readouterr().out
