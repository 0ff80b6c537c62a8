"""A page for each layer: what it is, when to use it, and figures that were measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import moezoo
from moezoo.command.tables import count

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    "CarvedMoE": "carving",
    "Engram": "token_tables",
    "FastFeedForward": "fast_feed_forward",
    "Finedeep": "finedeep",
    "HashLayer": "hash_layer",
    "L3": "memories",
    "MemoryPlus": "memory_plus",
    "MoLE": "token_tables",
    "PEER": "peer",
    "PerLayerEmbedding": "memories",
    "PersistentMemoryAttention": "persistent_memory",
    "ProductKeyMemory": "product_key_memory",
    "STEM": "token_tables",
    "SelectiveFFN": "selective_ffn",
    "SigmaMoE": "sigma_moe",
    "SparseMoE": "sparse_moe",
    "TopKFFN": "top_k_ffn",
    "UltraFastFFF": "ultra_fast_fff",
}


def test_every_layer_but_the_dense_one_has_a_page():
    assert {method.layer.__name__ for method in moezoo.zoo()} == PAGES.keys() | {"DenseFFN"}


@pytest.mark.parametrize("page", PAGES.values())
def test_it_has_a_formula_a_figure_and_says_when_to_use_it(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    start = text.partition("\n## ")[0]
    figures = re.findall(r"!\[[^]]+\]\((figures/\w+\.svg)\)", start)
    assert [figure for figure in figures if (DOCS / figure).is_file()], page
    if page != "carving":  # which is a page about a conversion
        assert re.search(r"^    \S.* = |`y = ", text, re.MULTILINE)
        assert "\n## When to use it\n" in text
        assert "\n## Cost\n" in text


def test_measured_figures_are_those_of_the_comparison():
    rows = json.loads((DOCS / "compare" / "results.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["name"]: row for row in rows}
    shown = set()
    for page in PAGES.values():
        _, _, section = (
            (DOCS / f"{page}.md").read_text(encoding="utf-8").partition("\n## Measured\n")
        )
        for line in re.findall(r"^\| (\w+) \|(.*)\|$", section, re.MULTILINE):
            if line[0] in measured and page != "carving":
                row = measured[line[0]]
                loss, random, *_ = (cell.strip() for cell in line[1].split("|"))
                assert loss == f"{row['loss']['value']:.3f}", (page, line)
                ablation = row["random_loss"]
                assert random == (f"{ablation['value']:.3f}" if ablation else "–"), (page, line)
                shown.add(line[0])
    assert set(measured) - {"dense_glu", "cmoe"} <= shown


def test_the_result_in_the_readme_is_the_best_causal_row_of_each_layer():
    rows = json.loads((DOCS / "compare" / "results.json").read_text(encoding="utf-8"))["rows"]
    best: dict[str, dict] = {}
    for row in rows:  # best first
        if row["causal"]:
            best.setdefault(row["layer"], row)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("\n## Result\n")
    table = re.findall(r"^\| (\w+) \| (\w+) \|(.*)\|$", section.partition("\n## ")[0], re.MULTILINE)
    shown = [
        (name, layer, *(cell.strip(" *") for cell in cells.split("|")))
        for name, layer, cells in table
        if name != "method"
    ]
    assert shown == [
        (
            row["name"],
            layer,
            f"{row['loss']['value']:.3f}",
            f"{row['random_loss']['value']:.3f}" if row["random_loss"] else "–",
            count(row["total_parameters"]),
        )
        for layer, row in best.items()
    ]
    routed = [row for row in rows if row["gain"]]
    ahead = [row for row in routed if row["gain"]["value"] > 0]
    assert f"{len(ahead)} of the {len(routed)} methods that route beat their own random" in readme
    assert f"all {len(rows)} rows" in readme


def in_words(number: int) -> str:
    """Spell a number below a hundred."""
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    small += "fifteen sixteen seventeen eighteen nineteen"
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    if number < 20:
        return small.split()[number]
    ten, one = divmod(number, 10)
    return tens[ten - 2] + (f"-{small.split()[one]}" if one else "")


def test_the_verdicts_in_the_readme_are_those_of_the_claims():
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    table = page.partition("## At equal active FLOPs")[2]
    verdicts = re.findall(r"\*\*(holds|fails|undecided)\*\* \|$", table, re.MULTILINE)
    held, failed, open_ = (in_words(verdicts.count(v)) for v in ("holds", "fails", "undecided"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{in_words(len(verdicts))} [claims of the literature]" in readme
    assert f"{held} hold, {failed} fail and {open_} are undecided" in readme


def test_every_figure_is_drawn_by_the_script(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "figures")
    specification = importlib.util.spec_from_file_location("figures", DOCS / "figures" / "draw.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    names = {figure.__name__ for figure in script.FIGURES}
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == names
    canvas = script.FIGURES[0]()
    assert len(canvas.axes.texts) > 7
