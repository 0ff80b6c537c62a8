"""Pictures and page of a finished comparison, drawn again without training or loading a model.

Run as ``python -m moezoo_train.experiments.compare.redraw COMPARISON``; it reads ``results.json``,
``curves.csv`` and ``config.yaml``, whatever versions and machine these are of.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moezoo.errors import InputError
from moezoo_train.experiments.compare.claims import judge, parse_claims
from moezoo_train.experiments.compare.figure import draw
from moezoo_train.experiments.compare.page import read_comparison, write_page
from moezoo_train.experiments.compare.results import loads


def redraw(folder: Path) -> list[str]:
    """Draw all pictures and the page, and return the files' names.

    Raises:
        InputError: the folder holds no comparison that can be read.
    """
    found = read_comparison(folder)
    pictures = draw(
        folder,
        found.rows,
        found.curves,
        loads(found.rows, found.results),
        found.whole["experiment"]["baseline"],
        found.whole["notes"][0],
        judge(parse_claims(found.whole), found.results),
    )
    write_page(folder, found, pictures)
    return [*pictures, "index.html"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m moezoo_train.experiments.compare.redraw COMPARISON")
    try:
        print(f"{sys.argv[1]}/ holds {', '.join(redraw(Path(sys.argv[1])))}.")
    except InputError as error:
        sys.exit(f"error: {error}")
