"""Bring the repository's pages outside docs/ into the site, and make all links lead somewhere.

In the repository, links are relative to the file that they are in, so that they work wherever it is
browsed. On the site, docs/ is the top. Pages are named in mkdocs.yml by their path in the
repository; files that pages link to come along.

Some files are on the site only, and made when it is built (``BUILT``). In the repository there is
nothing to link to, so pages name them in code, of which the site makes links.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")
CODE = re.compile(r"(?<!\[)`([\w./-]+)`")


def comparison_page() -> str:
    """Return the page of the committed comparison: its table, to be sorted, and its pictures."""
    from moezoo_train.experiments.compare.page import PICTURES, read_comparison, render

    folder = ROOT / "docs" / "compare"
    there = {stem: folder / f"{stem}.png" for stem in PICTURES}
    pictures = {stem: path.read_bytes() for stem, path in there.items() if path.exists()}
    return render(read_comparison(folder), pictures)


BUILT: dict[str, Callable[[], str]] = {"docs/compare/index.html": comparison_page}
"""Files of the site that the repository does not have, and what writes them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the navigation's pages as the site does, and write out patterns."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and whatever pages link to."""
    from mkdocs.structure.files import File

    waiting = {source_of(uri) for uri in pages_of(config.nav)}
    waiting |= {source_of(file.src_uri) for file in files.documentation_pages()}
    known: set[str] = set()
    while waiting:
        source = waiting.pop()
        known.add(source)
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            waiting |= {target for _, target in links(text, source)} - known
    for source in sorted(known):
        if files.get_file_from_path(uri_of(source)) is None:
            path = str(ROOT / source)
            files.append(File.generated(config, uri_of(source), abs_src_path=path))
    for source, build in BUILT.items():
        files.append(File.generated(config, uri_of(source), content=build()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where files are on the site."""
    return rewritten(markdown, source_of(page.file.src_uri))


def expanded(nav: Any) -> Any:
    """Turn paths in the repository into those on the site; a pattern becomes a list."""
    if isinstance(nav, list):
        return [expanded(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: expanded(entry) for title, entry in nav.items()}
    if "*" in nav:
        found = sorted(ROOT.glob(nav), key=lambda path: (path.name != "README.md", path))
        return [uri_of(path.relative_to(ROOT).as_posix()) for path in found]
    return uri_of(nav)


def pages_of(nav: Any) -> Iterator[str]:
    """Go through the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from pages_of(entry)


def uri_of(source: str) -> str:
    """Return where on the site a file of the repository is."""
    return source.removeprefix("docs/")


def source_of(uri: str) -> str:
    """Return where in the repository a file of the site is."""
    return f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri


def links(markdown: str, source: str) -> Iterator[tuple[re.Match[str], str]]:
    """Find the links of a page to files of the repository, with the paths of these."""
    for match in LINK.finditer(markdown):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[0]))
        if not target.startswith("..") and (ROOT / target).is_file():
            yield match, target


def rewritten(markdown: str, source: str) -> str:
    """Make a page's links to files relative to where it is on the site; link to what is built."""
    folder, here = posixpath.dirname(source), posixpath.dirname(uri_of(source)) or "."

    def link(code: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, code[1]))
        if target not in BUILT:
            return code[0]
        return f"[{code[0]}]({posixpath.relpath(uri_of(target), here)})"

    pieces, end = [], 0
    for match, target in links(markdown, source):
        pieces += [markdown[end : match.start()], posixpath.relpath(uri_of(target), here)]
        end = match.end()
    return CODE.sub(link, "".join(pieces) + markdown[end:])
