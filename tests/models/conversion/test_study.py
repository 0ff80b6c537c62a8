"""`moezoo inspect carving`: its last two rows are what `moezoo carve` makes and prints."""

import json

import pytest

from moezoo import InputError
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.study import CARVES, inspect_carving


def test_the_study_follows_the_rules_of_the_command(readable, text, tmp_path, capsys):
    source = readable()
    study = inspect_carving(source, **text, output=str(tmp_path / "study.json"))
    assert json.loads((tmp_path / "study.json").read_text())["ratios"] == study.ratios
    (size, found), *others = study.ratios.items()
    assert (size, others) == ("S5A1E8", [])
    assert list(found) == ["static", "static_refit", *CARVES, "prune", "carve"]
    assert size in capsys.readouterr().out
    made = carve(source, tmp_path / "out", to="moezoo", budgets="equal", sparsified=False, **text)
    printed = made.extra["perplexity"]
    assert study.dense == pytest.approx(printed["dense"], rel=1e-6)
    for row, name in (("carve", "carved"), ("prune", "static_refit"), ("static", "static")):
        assert found[row] == pytest.approx([printed[name] / printed["dense"]], rel=1e-6)
    assert found["carve"] != pytest.approx(found["ridge_refit"], rel=1e-4)
    assert found["prune"] != pytest.approx(found["static_refit"], rel=1e-4)


def test_sizes_that_do_not_fit_are_refused(readable, text):
    with pytest.raises(InputError, match="sizes: 'S1A2' is no size"):
        inspect_carving(readable(), sizes=["S1A2"], **text)
    with pytest.raises(InputError, match="experts: 7 does not divide the block's 48 neurons"):
        inspect_carving(readable(), sizes=["S1A2E7"], **text)
