"""What goes along with a model's weights when others are made of it: its licence and its README.

Licences allow to pass a model on if they go with it, and most ask to say what was changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from moezoo.atomic import named_errors
from moezoo_models.files.model_files import check_inside

README = "README.md"
HEADING = "## Changes made by moezoo"

_LICENSE = re.compile(
    r"(licen[cs]e|copying|notice|use_policy|acceptable_use|third_party)[\w.-]*", re.IGNORECASE
)
_CODE = (".py", ".so", ".bin", ".pt", ".safetensors")


def is_license(name: str) -> bool:
    """Return whether a file's name is that of a licence, a notice or rules of use."""
    return _LICENSE.fullmatch(name) is not None and not name.lower().endswith(_CODE)


def carry_over(
    sources: Sequence[Path], fresh: Path, change: str, replaced: Path | None = None
) -> None:
    """Copy the licences and READMEs of models to one that was made of them.

    The README gets a section that says what was changed; where there is none, none is made. Those
    of further models get a number. What stands in the directory that is replaced is not lost: a
    README that begins as the model's does is continued, and what differs otherwise is kept as
    ``NAME.earlier``.

    Args:
        sources: directories of the models.
        fresh: directory that is being filled.
        change: what was changed, in one sentence; Markdown.
        replaced: the directory whose place it takes, if there is one.

    Raises:
        InputError: a file is a link that leads out of its directory.
    """
    files: dict[str, bytes] = {}
    for number, source in enumerate(sources, 1):
        for file in _companions(source):
            name, content = file.name, file.read_bytes()
            if number > 1 and files.get(name) == content:
                continue
            stem, dot, ending = name.partition(".")
            files[name if number == 1 else f"{stem}_{number}{dot}{ending}"] = content
    for file in _companions(replaced):
        name, content = file.name, file.read_bytes()
        new = files.setdefault(name, content)
        if name == README and content.startswith(new.rstrip()):
            files[name] = content
        elif new != content:
            files[f"{name}.earlier"] = content
    if README in files:
        files[README] = with_change(files[README], change)
    for name, content in files.items():
        with named_errors(fresh / name):
            (fresh / name).write_bytes(content)


def with_change(readme: bytes, change: str) -> bytes:
    """Return a README with a section that says what was changed; a second change is added to it."""
    text = readme.decode("utf-8", errors="surrogateescape").rstrip()
    line = "- " + " ".join(change.split())
    lines = text.splitlines()
    if HEADING not in lines:
        lines += ["", HEADING, "", line]
    else:
        start = lines.index(HEADING) + 1
        section = takewhile(lambda each: not each.startswith("#"), lines[start:])
        own = "\n".join(section).rstrip().splitlines()
        if line in own:
            return readme
        lines.insert(start + len(own), line)
    return "\n".join([*lines, ""]).encode("utf-8", errors="surrogateescape")


def _companions(directory: Path | None) -> Iterator[Path]:
    if directory is None or not directory.is_dir():
        return
    for file in sorted(directory.iterdir()):
        if (file.name == README or is_license(file.name)) and file.is_file():
            check_inside(file)
            yield file
