"""House rules that a reader can see: short files, no traces of one machine, no empty promises."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = {"build", "dist", "runs", "lightning_logs", "__pycache__"}
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cpp", ".h", ""}


def files() -> list[Path]:
    """Every text file of the project, without what tools leave behind."""
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        skipped = SKIPPED.intersection(parts) or any(p.endswith(".egg-info") for p in parts)
        if path.is_file() and not hidden and not skipped and path.suffix in TEXT:
            found.append(path)
    return found


FILES = files()
CODE = [path for path in FILES if path.suffix == ".py" and "tests" not in path.parts]


def test_the_search_finds_the_project():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"moezoo/feed_forward.py", "README.md", ".ci/run", "Makefile"} <= names


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in CODE
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_path_of_one_machine():
    # Spelt so that this file does not contain what it looks for.
    homes = re.compile(
        "|".join(["/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + r"Users/\w"])
    )
    found = [str(path) for path in FILES if homes.search(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"])
def test_no_promises_in_comments(word):
    pattern = re.compile(rf"\b{word}\b")
    found = [str(path) for path in FILES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_no_banners_in_comments():
    banner = re.compile(r"#\s*[-=#*~]{4,}")
    for path in FILES:
        if path.suffix == ".py":
            source = io.StringIO(path.read_text(encoding="utf-8"))
            comments = [
                t for t in tokenize.generate_tokens(source.readline) if t.type == tokenize.COMMENT
            ]
            assert not [c.string for c in comments if banner.match(c.string)], path
