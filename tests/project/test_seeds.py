"""The page of papers has every method of the zoo, and no empty row."""

import re

from moezoo.feed_forward import zoo

from .test_documentation import ROOT

PAGE = (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| paper")
]


def test_every_row_says_where_and_what_came_of_it():
    assert len(ROWS) > 50
    for row in ROWS:
        assert len(row) == 4, row
        assert all(row), row
        paper, here, page, verdict = row
        left_out = here == page == "–"
        assert left_out == verdict.startswith("out: "), row
        assert left_out or ("`" in here and "](" in page), row
        assert re.search(r"\d{4}\.\d{5}|transformers|Su 2026|LongCat", paper), row


def test_every_method_of_the_zoo_is_there():
    text = " ".join(row[0] for row in ROWS)
    names = " ".join(row[1] for row in ROWS)
    without = {"dense_mlp", "dense_glu"}
    for method in zoo():
        if method.name not in without:
            assert f"`{method.name}`" in names or method.paper.arxiv in text, method.name
            assert method.paper.arxiv in text, method.paper.arxiv
