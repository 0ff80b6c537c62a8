"""Help pages that are kept: rendered once, and anew as soon as anything could have changed them."""

import os
import subprocess
import sys

import pytest

from moezoo import __main__ as command
from moezoo.command import pages


@pytest.fixture
def page(monkeypatch, tmp_path, capsys):
    """Return a function that shows a page, and the list of its renderings; a package to change."""
    package = tmp_path / "sources" / "page_package"
    package.mkdir(parents=True)
    for name in ("__init__.py", "other.py"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "sources"))
    monkeypatch.setattr(pages, "_OWN", ("page_package",))
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    rendered = []

    def render():
        rendered.append(1)
        print(f"page {len(rendered)}: 3 × 4")
        raise SystemExit(0)

    def show():
        with pytest.raises(SystemExit) as end:
            pages.show("fit", render)
        assert end.value.code == 0
        return capsys.readouterr().out

    return show, rendered, package


def test_a_page_is_rendered_once(page):
    show, rendered, _ = page
    assert show() == show() == show() == "page 1: 3 × 4\n"
    assert len(rendered) == 1


def _edit(package):
    (package / "other.py").write_text("x = 1")


def _touch(package):
    os.utime(package / "other.py", ns=(1, 1))


def _remove(package):
    (package / "other.py").unlink()


def _add(package):
    (package / "more").mkdir()
    (package / "more" / "new.yaml").write_text("")


def _install(package):
    (package.parent / "other-1.0.dist-info").mkdir()
    os.utime(package.parent, ns=(2, 2))


@pytest.mark.parametrize("change", [_edit, _touch, _remove, _add, _install])
def test_a_change_of_files_renders_anew(page, change):
    show, _, package = page
    assert show() == "page 1: 3 × 4\n"
    change(package)
    assert show() == show() == "page 2: 3 × 4\n"


@pytest.mark.parametrize("variable", ["COLUMNS", "LANG", "PL_FAULT_TOLERANT", "PYTHONPATH"])
def test_a_change_of_width_or_language_renders_anew(page, monkeypatch, variable):
    show, _, _ = page
    monkeypatch.setenv(variable, "70")
    assert show() == "page 1: 3 × 4\n"
    monkeypatch.setenv(variable, "71")
    assert show() == show() == "page 2: 3 × 4\n"


@pytest.mark.parametrize("damage", ["", "no digest", "0" * 64 + "\npage 1: 3 × 4\n", "\udcff"])
def test_a_damaged_page_is_rendered_anew(page, tmp_path, damage):
    show, _, _ = page
    show()
    file = tmp_path / "cache" / "help" / "fit.txt"
    whole = file.read_bytes()
    for content in (damage.encode("utf-8", "surrogateescape"), whole[:-2], whole + b"x"):
        file.write_bytes(content)
        assert show() == show() != "page 1: 3 × 4\n"


def test_a_folder_that_cannot_be_used_is_no_failure(page, monkeypatch, tmp_path):
    show, _, _ = page
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "file"))
    assert [show(), show()] == ["page 1: 3 × 4\n", "page 2: 3 × 4\n"]


def test_a_page_that_failed_is_not_kept(page, tmp_path, capsys):
    def fail():
        print("half")
        raise SystemExit(2)

    with pytest.raises(SystemExit) as end:
        pages.show("fit", fail)
    assert end.value.code == 2
    assert not (tmp_path / "cache").exists()


def test_the_kept_page_is_the_rendered_one_and_imports_nothing_heavy(tmp_path):
    environment = {**os.environ, "MOEZOO_CACHE": str(tmp_path), "COLUMNS": "80"}
    code = (
        "import sys; from moezoo.__main__ import main\n"
        "try: main(['plan', '--help'])\n"
        "finally: print({'torch', 'lightning', 'jsonargparse'} & set(sys.modules), file=sys.stderr)"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    assert "--trainer.max_steps" in first.stdout
    assert "lightning" in first.stderr
    assert second.stderr == "set()\n"


@pytest.mark.parametrize("given", [["--help", "--output", "runs/a"], ["--help=all"]])
def test_help_among_other_options_is_not_kept(monkeypatch, given, capsys):
    monkeypatch.setattr(pages, "show", lambda *_: pytest.fail("kept"))
    monkeypatch.setattr(command, "_load", lambda _: lambda words: print(words))
    assert command.main(["fit", *given]) == 0
    assert capsys.readouterr().out == f"{['fit', *given]}\n"
