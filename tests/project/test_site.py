"""The site has every page, and its links lead to where files are on it."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site():
    specification = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_page_of_docs_is_in_the_navigation_once(site):
    named = list(site.pages_of(site.expanded(SETTINGS["nav"])))
    assert len(named) == len(set(named))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(named)
    assert {"README.md", "kernels/README.md", "models/cards/README.md"} <= set(named)
    for uri in named:
        assert (ROOT / site.source_of(uri)).is_file(), uri


def test_pages_below_docs_that_the_navigation_leaves_out_are_linked_to(site):
    pages = sorted((ROOT / "docs").glob("*.md"))
    linked = {
        target
        for page in pages
        for _, target in site.links(page.read_text(encoding="utf-8"), f"docs/{page.name}")
    }
    below = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*/**/*.md")}
    named = {site.source_of(uri) for uri in site.pages_of(site.expanded(SETTINGS["nav"]))}
    assert below <= linked | named


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("README.md", "[x](docs/peer.md#cost) [y](LICENSE)", "[x](peer.md#cost) [y](LICENSE)"),
        ("docs/peer.md", "[x](usage.md)", "[x](usage.md)"),
        ("docs/peer.md", "[x](../models/cards/peer.md)", "[x](models/cards/peer.md)"),
        ("docs/peer.md", "[x](../moezoo/layers/peer.py)", "[x](moezoo/layers/peer.py)"),
        ("docs/compare/table.md", "[x](../../README.md)", "[x](../README.md)"),
        ("models/cards/README.md", "[x](../../docs/compare.md)", "[x](../../compare.md)"),
        ("kernels/README.md", "[x](../docs/peer.md) [y](#z)", "[x](../peer.md) [y](#z)"),
        ("docs/compare.md", "`compare/index.html`", "[`compare/index.html`](compare/index.html)"),
        (
            "README.md",
            "`docs/compare/index.html`",
            "[`docs/compare/index.html`](compare/index.html)",
        ),
        ("docs/compare.md", "`index.html` and `compare/table.md`", None),
        ("docs/peer.md", "[x](https://a.b/c.md) [y](gone.md)", None),
        ("docs/peer.md", "layers[0](hidden) and ![x](../../outside.png)", None),
    ],
)
def test_links_are_those_of_the_site(site, source, markdown, expected):
    assert site.rewritten(markdown, source) == (expected or markdown)


def test_files_that_only_the_site_has_are_built_and_named_by_a_page(site):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for source in site.BUILT:
        assert not (ROOT / source).exists()
        assert any(f"`{site.uri_of(source)}`" in page for page in pages)


def test_the_page_of_the_comparison_has_all_its_rows_and_pictures(site):
    page = site.comparison_page()
    rows = json.loads((ROOT / "docs/compare/results.json").read_text(encoding="utf-8"))["rows"]
    assert page.count("<tr data-place=") == len(rows)
    assert all(f">{row['name']}" in page for row in rows)
    assert page.count("data:image/png;base64,") == 3


def entry(plugin):
    return plugin if isinstance(plugin, dict) else [plugin]


ROOMS = ("checkpoints", "text", "evaluation", "inspect", "conversion")


@pytest.mark.parametrize(
    "package",
    [
        "moezoo",
        "moezoo.analysis",
        "moezoo.bench",
        "moezoo.convert",
        "moezoo_kernels",
        "moezoo_models",
        "moezoo_train",
        *(f"moezoo_models.{room}" for room in ROOMS),
    ],
)
def test_every_public_name_is_in_the_reference_once(package):
    names = importlib.import_module(package).__all__
    described = [
        name
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if name.rpartition(".")[0] == package
    ]
    assert sorted(described) == sorted(f"{package}.{name}" for name in names)


def test_nothing_is_fetched_when_a_page_is_read():
    assert SETTINGS["theme"]["font"] is False
    assert [name for plugin in SETTINGS["plugins"] for name in entry(plugin)] == [
        "search",
        "mkdocstrings",
    ]
    assert not {"extra_css", "extra_javascript"} & SETTINGS.keys()


MADE = (".pyc", ".so")


def is_finished() -> bool:
    """Return whether `make docs` has built the site since anything that it shows was changed."""
    stamp = ROOT / "build" / "site.built"
    if not stamp.exists():
        return False
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in ("configs", "docs", "kernels", "models", "moezoo", "train"):
        files += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in MADE]
    return max(path.stat().st_mtime for path in files) < stamp.stat().st_mtime


@pytest.fixture
def built(tmp_path) -> Path:
    """Return where the site is: the one of `make docs`, or another if that is older than a page."""
    if is_finished():
        return ROOT / "build" / "site"
    pytest.importorskip(
        "mkdocstrings", reason="mkdocs is not installed (pip install 'moezoo[docs]')"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(built):
    pages = sorted(built.rglob("*.html"))
    assert built / "models/cards/peer.html" in pages
    layers = (built / "reference/layers.html").read_text(encoding="utf-8")
    assert 'id="moezoo.PEER"' in layers
    # References to objects became links, and none is left as it stands in the source.
    assert 'href="#moezoo.FeedForwardOutput"' in layers
    assert not re.search(r":(?:class|func|meth|mod):`", layers)
    assert "::</p>" not in layers
    # The page of the comparison is there, is linked to, and compare.md is not written over it.
    comparison = (built / "compare/index.html").read_text(encoding="utf-8")
    assert comparison.count("<img") == 3
    assert 'href="compare/index.html"' in (built / "compare.html").read_text(encoding="utf-8")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*>", text)
        elsewhere = [where for where in loaded if "//" in where.partition("data:")[0]]
        assert elsewhere == [], page
