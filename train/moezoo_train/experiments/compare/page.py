"""One HTML page of a comparison that needs nothing else: no network, no other file.

It has the table, to be sorted by any column, and the pictures as they are; what draws them is
:mod:`moezoo_train.experiments.compare.figure` alone.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo_train.experiments.compare import claims
from moezoo_train.experiments.compare.curves import Curve, parse_curves
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.results import Row, parse_row
from moezoo_train.experiments.compare.table import COLUMNS, HELP, cells_of, keys_of
from moezoo_train.measure.writing import write_text

PICTURES = {
    "loss": (
        "Validation loss",
        "A dot is the method, the ring joined to it the same model with random routing, where the "
        "choice of experts, slots or neurons ignores the token. The line is the baseline. Further "
        "left is better.",
    ),
    "compute": (
        "Training loss against training compute",
        "Compute counts three times the active FLOPs of the forward pass; trees and top-k layers "
        "compute more than that while training, which tokens/s in the table shows. The first "
        "quarter of a run is cut off above.",
    ),
    "parameters": (
        "Validation loss against parameters",
        "Parameters are those of the whole model; how many of them one token uses is in the table.",
    ),
    "load": (
        "Load and usage",
        "Which experts, slots or neurons the held-out text was routed to. Evenness is the entropy "
        "of the load over its maximum; used is the share of them that any token of a batch was "
        "routed to; unevenness is the KL divergence of their total gate weights from uniform.",
    ),
}
"""Title and caption of the pictures that a page shows, by file stem, in order."""


@dataclass(frozen=True)
class Finished:
    """The results of a comparison, read from disk.

    Attributes:
        whole: its ``results.json``.
        rows: in it.
        results: in it.
        curves: of ``curves.csv``; none if there is no such file.
        config: ``config.yaml``, or None.
    """

    whole: Mapping[str, Any]
    rows: list[Row]
    results: list[RunResult]
    curves: list[Curve]
    config: str | None


def read_comparison(folder: Path) -> Finished:
    """Read what ``moezoo compare`` wrote, by an earlier version too.

    Raises:
        InputError: there is no comparison, or it cannot be read.
    """

    def text(name: str) -> str | None:
        path = folder / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    try:
        whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return Finished(
            whole=whole,
            rows=[parse_row(row) for row in whole["rows"]],
            results=[RunResult(**run) for run in whole["runs"]],
            curves=parse_curves(text("curves.csv") or ""),
            config=text("config.yaml"),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"comparison: {folder} holds none that can be read: {error}") from error


def write_page(folder: Path, comparison: Finished, pictures: Iterable[str]) -> None:
    """Write ``index.html`` beside the pictures of a comparison.

    Args:
        folder: where the pictures are.
        comparison: what the page is about.
        pictures: names of the pictures' files; a page shows the PNG ones that it knows.
    """
    shown = {Path(name).stem for name in pictures} & PICTURES.keys()
    found = {stem: (folder / f"{stem}.png").read_bytes() for stem in shown}
    write_text(folder / "index.html", render(comparison, found))


def render(comparison: Finished, pictures: Mapping[str, bytes]) -> str:
    """Return the page; no text of a comparison is taken for markup.

    Args:
        comparison: what it is about.
        pictures: PNG files, by the names in :data:`PICTURES`.
    """
    template = files("moezoo_train.experiments.compare") / "template"

    def read(name: str) -> str:
        return (template / name).read_text(encoding="utf-8")

    heading, _, subtitle = str(comparison.whole["title"]).partition(": ")
    notes = comparison.whole["notes"]
    judged = claims.judge(claims.parse_claims(comparison.whole), comparison.results)
    parts = {
        "title": html.escape(f"{heading} · {subtitle or 'moezoo'}"),
        "heading": html.escape(heading),
        "subtitle": html.escape(subtitle),
        "lead": html.escape(notes[0] if notes else ""),
        "table": _table(comparison),
        "columns": _terms((name.lstrip(">"), text) for name, text in HELP.items()),
        "claims": _claims(judged) if judged else "",
        "pictures": "\n".join(
            _picture(stem, pictures[stem]) for stem in PICTURES if stem in pictures
        ),
        "conditions": _conditions(comparison),
        "style": read("style.css"),
        "script": read("sort.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: parts[marker[1]], read("index.html"))


def versions(results: Iterable[RunResult]) -> list[dict[str, Any]]:
    """List the machines and versions that runs were made with, each with its number of runs."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.environment:
            version = {"moezoo": result.identity.get("moezoo"), **result.environment}
            entry = found.setdefault(json.dumps(version, sort_keys=True), {**version, "runs": 0})
            entry["runs"] += 1
    return list(found.values())


def _table(comparison: Finished) -> str:
    num_layers = comparison.whole["experiment"]["model"]["num_layers"]
    head = [
        f'<th{_class(name)} scope="col"{_sorted(name)}>'
        f'<button type="button" title="{html.escape(HELP[name])}">{name.lstrip(">")}</button></th>'
        for name in COLUMNS
    ]
    lines = []
    for place, row in enumerate(comparison.rows):
        cells = zip(COLUMNS, cells_of(row, num_layers), keys_of(row, num_layers), strict=True)
        line = "".join(
            f"<td{_class(name)}{_key(key)}>{html.escape(text)}</td>" for name, text, key in cells
        )
        lines.append(f'<tr data-place="{place}">{line}</tr>')
    return (
        f'<table class="sortable"><thead><tr>{"".join(head)}</tr></thead>\n'
        + "<tbody>\n{}\n</tbody></table>".format("\n".join(lines))
    )


def _class(name: str) -> str:
    return ' class="number"' if name.startswith(">") else ""


def _sorted(name: str) -> str:
    return ' aria-sort="ascending"' if name == ">val loss" else ""  # rows are best first


def _key(key: str | float | None) -> str:
    missing = key is None or key != key  # a loss that is not a number is last, too
    return "" if missing else f' data-key="{html.escape(str(key))}"'


def _claims(judged: Sequence[claims.Judged]) -> str:
    head = "".join(f'<th scope="col">{name.lstrip(">")}</th>' for name in claims.COLUMNS)
    lines = []
    for one in judged:
        for contest, cells in zip(one.contests, claims.cells_of(one), strict=True):
            says, paper, verdict, *rest = map(html.escape, cells)
            line = f'<td class="says">{says}</td><td>{paper}</td>'
            line += f'<td class="{one.verdict}">{verdict}</td>'
            line += "".join(f'<td class="{contest.verdict}">{cell}</td>' for cell in rest)
            lines.append(f"<tr>{line}</tr>")
    body = "\n".join(lines)
    return (
        f'<section class="card"><h2>Claims</h2><p>{claims.HOW}</p><div class="scroll">'
        f'<table id="claims"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
        "</div></section>"
    )


def _picture(stem: str, content: bytes) -> str:
    title, caption = PICTURES[stem]
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<section class="card" id="{stem}"><h2>{title}</h2><p>{caption}</p>'
        f'<img src="data:image/png;base64,{data}" alt="{title}; the numbers are in the table">'
        "</section>"
    )


def _conditions(comparison: Finished) -> str:
    notes = [*comparison.whole["notes"]]
    for version in versions(comparison.results):
        runs = version.pop("runs")
        notes.append(f"{runs} runs: {', '.join(f'{k} {v}' for k, v in version.items())}.")
    parts = ["<ul>{}</ul>".format("".join(f"<li>{html.escape(note)}</li>" for note in notes))]
    if command := comparison.whole.get("command"):
        parts.append(f"<p>Made by</p><pre><code>{html.escape(command)}</code></pre>")
    if comparison.config:
        parts.append(
            "<details><summary>config.yaml, in full</summary>"
            f"<pre><code>{html.escape(comparison.config)}</code></pre></details>"
        )
    return "\n".join(parts)


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    lines = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in pairs)
    return f"<dl>{''.join(lines)}</dl>"
