"""What a comparison says of the claims about its rows."""

import json
import math
from pathlib import Path

import pytest
import yaml

from moezoo import InputError
from moezoo_train.experiments.common.statistics import QUANTILES
from moezoo_train.experiments.compare.claims import judge, markdown
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.forest import forest
from moezoo_train.experiments.compare.runs import plan
from moezoo_train.experiments.compare.settings import Claim, parse_claims, parse_methods

from .test_compare import command, experiment, recipe, results  # noqa: F401 - a fixture

LOSSES = {"low": (2.0, 2.2, 2.1), "middle": (3.5, 3.6, 3.7), "high": (3.6, 3.5, 3.9)}


def measured() -> list[RunResult]:
    return [
        RunResult(f"{row}-{seed}", "", {}, val_loss=loss, busiest=10 - loss if seed else None)
        for row, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]


def claim(*order, measure="loss") -> Claim:
    return Claim("That is so", "arXiv:1", list(order), measure)


def test_the_quantiles_are_those_of_students_t():
    def density(t: float, freedom: int) -> float:
        log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        power = -(freedom + 1) / 2 * math.log1p(t * t / freedom)
        return math.exp(log + power) / math.sqrt(freedom * math.pi)

    for freedom, quantile in enumerate(QUANTILES, 1):
        steps = 4000
        points = [quantile * (n + 0.5) / steps for n in range(steps)]
        inside = 2 * quantile / steps * sum(density(t, freedom) for t in points)
        assert inside == pytest.approx(0.95, abs=5e-5)


def test_a_difference_is_paired_by_seed_and_has_an_interval():
    (one,) = judge({"a": claim("low", "middle")}, measured())
    (contest,) = one.contests
    assert (contest.lower, contest.higher) == ("low", "middle")
    assert contest.gain.value == pytest.approx(1.5)  # of 1.5, 1.4, 1.6
    error = 0.1 / math.sqrt(3)
    assert contest.interval == pytest.approx((1.5 - 4.303 * error, 1.5 + 4.303 * error))
    assert one.verdict == "holds"


def test_verdicts():
    claims = {
        "holds": claim("low", ["middle", "high"]),
        "fails": claim("high", "low"),
        "undecided": claim("low", "middle", "high"),  # the second step is 0.1, -0.1, 0.2
        "one fails": claim(["low", "high"], "low"),
        "turned": claim("high", "low", measure="busiest"),  # two seeds: 12.7 standard errors
        "unknown": claim("low", "other"),
    }
    found = {one.name: one.verdict for one in judge(claims, measured())}
    assert found == {
        "holds": "holds", "fails": "fails", "undecided": "undecided", "one fails": "fails",
        "turned": "undecided", "unknown": "undecided",
    }  # fmt: skip


def test_a_single_seed_a_failed_run_and_random_routing_decide_nothing():
    runs = [r for r in measured() if not r.run.endswith(("1", "2"))]
    (one,) = judge({"a": claim("low", "middle")}, runs)
    assert one.contests[0].interval is None
    assert one.verdict == "undecided"
    broken = [
        *measured(),
        RunResult("bad-0", "", {}, failure="no", val_loss=1.0),
        RunResult("low-random-0", "", {}, val_loss=-9.0),
    ]
    low, bad = judge({"a": claim("low", "middle"), "b": claim("bad", "low")}, broken)
    assert low.contests[0].gain.value == pytest.approx(1.5)
    assert bad.contests[0].gain is None
    diverged = [*measured(), *(RunResult(f"nan-{n}", "", {}) for n in range(3))]
    (one,) = judge({"a": claim("nan", "low")}, diverged)
    assert one.verdict == "undecided"


def test_it_is_written_and_drawn():
    judged = judge({"a": claim("low", ["middle", "high"]), "b": claim("high", "x")}, measured())
    lines = markdown("Title", judged, ["2 blocks."]).splitlines()
    assert lines[0] == "# Title"
    assert lines[4] == (
        "| That is so | arXiv:1 | **holds** | low < middle | loss | +1.500 | +1.252 to +1.748 |"
    )
    assert lines[5].startswith("|  |  |  | low < high | loss | +1.567 |")
    assert lines[6].endswith("| **undecided** | high < x | loss | – | – |")
    assert lines[-1] == "2 blocks."
    (axes,) = forest(judged, "2 blocks.").axes
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks == ["low < middle", "low < high", "high < x"]
    assert len(axes.lines) == 3  # two dots, and the line at zero


METHODS = parse_methods({"peer": {}, "hash": {}})
GOOD = {"says": "so", "paper": "arXiv:1", "order": ["peer", "hash"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (3, "claims.a: 3 is not a mapping"),
        ({"says": "so"}, "claims.a.paper: is missing"),
        (GOOD | {"oder": []}, "claims.a.oder: no such option; did you mean 'order'?"),
        (GOOD | {"order": ["peer"]}, "claims.a.order: name two rows or more, the lowest first"),
        (GOOD | {"order": "peer"}, "claims.a.order: name two rows or more, the lowest first"),
        (GOOD | {"order": ["peer", ["hsh"]]}, "claims.a.order: 'hsh' is not known; did you mean"),
        (GOOD | {"order": ["peer", []]}, "claims.a.order: a place has no row"),
        (GOOD | {"measure": "los"}, "claims.a.measure: 'los' is not known; did you mean 'loss'?"),
    ],
)
def test_mistakes_are_named(options, expected):
    with pytest.raises(InputError) as error:
        parse_claims({"a": options}, METHODS)
    assert str(error.value).startswith(expected)


@pytest.mark.slow
def test_a_comparison_judges_and_its_hash_follows_its_baseline(recipe, capsys):  # noqa: F811
    options = yaml.safe_load(recipe.read_text())
    options["methods"] = {
        "clustered": {"method": "hash", "arguments": {"hash_function": "clustered"}},
        "dense_mlp": {},
    }
    options["claims"] = {
        "some": {"says": "It is so", "paper": "arXiv:1", "order": ["clustered", "dense_mlp"]}
    }
    recipe.write_text(yaml.safe_dump(options, sort_keys=False))
    assert command(recipe, "--ablation", "false") == 0
    captured = capsys.readouterr()
    assert captured.err.index("dense_mlp, seed 0") < captured.err.index("clustered, seed 0")
    assert "undecided: It is so (arXiv:1)" in captured.out
    first = results()
    assert all(r["failure"] is None for r in first.values())
    assert "| It is so | arXiv:1 |" in Path("out/claims.md").read_text()
    assert Path("out/claims.png").stat().st_size > 10_000
    assert ">It is so</td>" in Path("out/index.html").read_text()

    # The same comparison of its own config.yaml; a baseline without its model is trained again.
    for file in Path("out/dense_mlp-1/model").iterdir():
        file.unlink()
    Path("out/dense_mlp-1/model").rmdir()
    assert command(Path("out/config.yaml")) == 0
    assert "4 runs, 3 of them finished before" in capsys.readouterr().err
    assert results()["dense_mlp-1"]["val_loss"] == first["dense_mlp-1"]["val_loss"]

    assert command(recipe, "--ablation", "false", "--only", "[clustered]") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moezoo: error: methods.clustered: its hash table is built from what the baseline has "
        "learned; add the row 'dense_mlp: {}'"
    )
    whole = json.loads(Path("out/results.json").read_text())
    assert whole["experiment"]["claims"]["some"]["measure"] == "loss"


def test_what_a_hash_follows_is_part_of_what_its_numbers_depend_on():
    def identity(**optimizer) -> dict:
        rows = {"dense_mlp": {"optimizer": optimizer}, "hash": HASH}
        runs = plan(experiment(methods=parse_methods(rows), ablation=False))
        assert [run.row for run in runs] == ["dense_mlp", "hash"]
        assert (runs[0].is_followed, runs[1].follows) == (True, runs[0])
        return runs[1].identity({})

    assert identity()["follows"] != identity(lr=0.5)["follows"]
    assert "follows" not in plan(experiment())[0].identity({})


HASH = {"arguments": {"hash_function": "dispersed"}}
