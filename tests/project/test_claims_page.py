"""The tables of verdicts on the claims' page are those of the committed numbers."""

import json
import re
from pathlib import Path

import pytest
import yaml

from moezoo_train.experiments.compare.claims import Judged, cells_of, judge, parse_claims
from moezoo_train.experiments.compare.page import read_comparison
from moezoo_train.experiments.compare.settings import Claim

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
FOLDERS = [path.parent for path in sorted((ROOT / "docs" / "compare").glob("*/claims.png"))]
BUSIEST = " (busiest ÷ mean)"


def lines_of(one: Judged) -> list[str]:
    """Lay a claim out as the page does: each contest's verdict is told where there are several."""
    lines = []
    for (says, paper, verdict, compared, measure, gain, interval), contest in zip(
        cells_of(one), one.contests, strict=True
    ):
        says += BUSIEST if says and measure == "busiest" else ""
        interval += f" {contest.verdict}" if len(one.contests) > 1 else ""
        own = verdict and f"**{verdict}**"
        cells = (says, paper.replace("arXiv:", ""), compared, gain, interval, own)
        lines.append(re.sub(r" +\|", " |", f"| {' | '.join(cells)} |"))
    return lines


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_verdicts_of_the_page_are_those_of_the_numbers(folder):
    found = read_comparison(folder)
    expected = [
        line for one in judge(parse_claims(found.whole), found.results) for line in lines_of(one)
    ]
    section = PAGE.partition(f"](compare/{folder.name}/claims.png)")[2].partition("\n[Table")[0]
    shown = re.findall(r"^\| .* \|$", section, re.MULTILINE)
    assert [re.sub(r" +\|", " |", line) for line in shown[1:]] == expected
    assert f"moezoo compare --config configs/experiments/compare/{folder.name}.yaml" in PAGE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_numbers_are_of_the_recipe(folder):
    recipe = yaml.safe_load(
        (ROOT / "configs" / "experiments" / "compare" / f"{folder.name}.yaml").read_text()
    )
    whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))["experiment"]
    rows = set(whole["methods"])
    assert rows <= set(recipe["methods"])
    assert {name: claim["order"] for name, claim in whole["claims"].items()} == {
        name: claim["order"]
        for name, claim in recipe["claims"].items()
        if rows.issuperset(row for place in Claim(**claim).places for row in place)
    }
    assert (whole["max_steps"], whole["seeds"]) == (recipe["max_steps"], recipe["seeds"])
