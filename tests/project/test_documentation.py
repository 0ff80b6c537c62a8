"""What README, CONTRIBUTING and docs/ say is true: files, commands, options, code."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from moezoo import __main__ as command
from moezoo.analysis.usage import Evenness
from moezoo.command.parser import function_parser, option_names
from moezoo_train.measure.expert_load import ExpertLoad

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LEFT_BEHIND = {"__pycache__", "build", "dist", "runs", "lightning_logs"}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[tuple[str, str]]:
    """Every line of every shell block, and every command in backticks, with its page."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in joined(block).splitlines()]
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines += re.findall(r"`((?:moezoo|make) [^`]+)`", prose)
        found += [(page.name, line) for line in lines]
    return found


def joined(block: str) -> str:
    return re.sub(r"\\\n\s*", " ", block)


def commands_of(program: str) -> list[tuple[str, list[str]]]:
    found = []
    for page, line in shell_lines():
        words = shlex.split(line, comments=True)
        if words and words[0] == program:
            found.append((page, joined_name(words[1:])))
    return found


def joined_name(words: list[str]) -> list[str]:
    """Make one word of a command's name that has two."""
    two = " ".join(words[:2])
    return [two, *words[2:]] if two in command.COMMANDS else words


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def tree_of_the_page() -> set[str]:
    """The paths of the annotated tree; two spaces of indent are one folder."""
    (tree,) = (block for block in blocks(ARCHITECTURE, "text") if "README.md" in block)
    paths, stack = set(), []
    for line in tree.splitlines():
        entry, _, note = line.strip().partition(" ")
        assert note.strip(), f"no annotation: {line}"
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], entry]
        paths.add("".join(stack))
    return paths


def tree_of_files() -> set[str]:
    """Every file at the top, and every folder that holds a file."""
    paths = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        ours = not any(p in LEFT_BEHIND or p.endswith(".egg-info") for p in parts)
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if not ours or hidden or not path.is_file():
            continue
        if len(parts) == 1:
            paths.add(path.name)
        paths |= {"/".join(parts[:n]) + "/" for n in range(1, len(parts))}
    return paths


def test_the_tree_is_the_tree():
    assert tree_of_the_page() == tree_of_files()


def test_files_and_folders_that_the_architecture_names_are_there():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+(?:\.py|/))`", text)
    assert len(named) > 60
    assert [name for name in named if "/" in name and not (ROOT / name).exists()] == [
        "model/"  # of a run
    ]
    folders = re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE)
    assert len(folders) == len(set(folders)) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_glossary_has_every_figure_of_the_load():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    names = {field.name for of in (ExpertLoad, Evenness) for field in fields(of)} - {"layer"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = {word for _, words in commands_of("make") for word in words if "=" not in word}
    assert {"demo", "test", "lint"} <= mentioned <= targets


def test_every_command_is_in_the_readme_and_every_mention_is_a_command():
    mentioned = {words[0] for _, words in commands_of("moezoo")} - {"COMMAND"}
    in_readme = {words[0] for page, words in commands_of("moezoo") if page == "README.md"}
    assert mentioned - {"--help", "--version"} <= set(command.COMMANDS)
    assert set(command.COMMANDS) <= in_readme


def test_options_in_the_pages_exist():
    checked = 0
    for page, (name, *words) in commands_of("moezoo"):
        if name not in command.COMMANDS or command.COMMANDS[name].lightning:
            continue
        each = command.COMMANDS[name]
        runs = each.words if words and not words[0].startswith("-") else None
        parser = function_parser(command._load(runs or each.function), name)
        known = set(option_names(parser))
        for word in words:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in known, (page, name, word)
                checked += 1
    assert checked > 0


def test_files_named_in_commands_exist():
    for page, words in commands_of("moezoo"):
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), (page, word)


def test_overview_examples_are_commands():
    for example in command.EXAMPLES:
        name, *words = joined_name(shlex.split(example)[1:])
        assert name in command.COMMANDS
        assert all((ROOT / word).is_file() for word in words if word.startswith("configs/"))


# What the trainers of docs/python.md say of themselves.
@pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_python_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what it writes, it writes there
    code = "\n".join(blocks(page, "python"))
    namespace: dict[str, object] = {}
    exec(compile(code, page.name, "exec"), namespace)


def test_the_error_shown_in_the_readme_is_the_error(capsys, tmp_path):
    (shown,) = (b for b in blocks(ROOT / "README.md", "text") if b.startswith("moezoo: error"))
    argv = ["fit", "--config", str(ROOT / "configs" / "moe.yaml"), "--model.ffn.num_expert", "3"]
    assert command.main([*argv, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == shown
    assert not (tmp_path / "run").exists()


def contributing() -> tuple[str, str]:
    layer, export = blocks(ROOT / "CONTRIBUTING.md", "python")
    return layer, export


def test_the_layer_of_contributing_has_ten_lines():
    layer, _ = contributing()
    (cls,) = (node for node in ast.parse(layer).body if isinstance(node, ast.ClassDef))
    lines = 0
    for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
        body = method.body[1:] if ast.get_docstring(method) else method.body
        lines += (body[-1].end_lineno or 0) - body[0].lineno + 1
    assert lines == 10


@pytest.mark.slow
def test_a_layer_is_added_as_contributing_says(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("moezoo", "kernels", "tests/moezoo"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for conftest in (ROOT / "tests").glob("conftest.py"):
        shutil.copy(conftest, tmp_path / "tests")
    layer, export = contributing()
    (tmp_path / "moezoo/layers/bottleneck.py").write_text(layer)
    names, listed = tmp_path / "moezoo/__init__.py", "_NAMES: dict[str, tuple[str, ...]] = {\n"
    before, after = names.read_text().split(listed)
    names.write_text(before + listed + export + after)

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (test_line,) = (line for line in blocks(ROOT / "CONTRIBUTING.md", "sh") if "pytest" in line)
    _, _, *words = shlex.split(test_line)
    output = run(*words, "-vv", "-p", "no:cacheprovider")
    assert len(re.findall(r"\[.*bottleneck.*\] PASSED", output)) >= 10
    (table_line,) = (
        line for line in blocks(ROOT / "CONTRIBUTING.md", "sh") if "write_table" in line
    )
    subprocess.run([sys.executable, *shlex.split(table_line)[1:]], cwd=tmp_path, check=True)
    assert "bottleneck" in run("moezoo", "zoo")
    run("ruff", "check", "moezoo/layers/bottleneck.py")
    # What it knows of torch is the same for the copy, and may be there from `make lint`.
    run("mypy", "--cache-dir", str(ROOT / ".mypy_cache"), "moezoo/layers/bottleneck.py")
