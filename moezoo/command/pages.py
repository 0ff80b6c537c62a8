"""Help pages whose parser takes seconds to import, kept from one call to the next.

A page is kept in ``help/`` in :func:`moezoo.cache_folder.cache_folder`, under a digest of all that
it depends on: our files, what is installed, the interpreter, the terminal's width and the language.
When one of them changes, or the file does, the page is rendered anew and takes its place. A folder
that cannot be read or written is no failure: then the page is rendered each time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

from moezoo.atomic import atomic_write
from moezoo.cache_folder import cache_folder

_OWN = ("moezoo", "moezoo_kernels", "moezoo_models", "moezoo_train")
_VARIABLES = ("COLUMNS", "LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "NO_COLOR", "FORCE_COLOR")
_PREFIXES = ("JSONARGPARSE", "MOEZOO_", "PL_", "PYTHON")


def show(name: str, render: Callable[[], None]) -> None:
    """Print a help page, the kept one if there is one.

    Args:
        name: of the command.
        render: prints the page, then exits.

    Raises:
        SystemExit: always, as a parser's help does.
    """
    path, key = cache_folder() / "help" / f"{name}.txt", _key()
    if (page := _read(path, key)) is None:
        page = _render(render)
        _keep(path, key, page)
    sys.stdout.write(page)
    raise SystemExit(0)


def _render(render: Callable[[], None]) -> str:
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            render()
    except SystemExit as end:
        if end.code:
            sys.stdout.write(printed.getvalue())
            raise
    return printed.getvalue()


def _key() -> str:
    """Write down all that a page depends on."""
    variables = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_PREFIXES)
    )
    width = shutil.get_terminal_size().columns
    return "\n".join([sys.version, sys.prefix, str(width), *variables, *_installed(), *_sources()])


def _installed() -> Iterator[str]:
    """Yield the folders that are imported from; installing anything there changes their times."""
    for folder in sys.path:
        try:
            yield f"{folder} {os.stat(folder or '.').st_mtime_ns}"
        except OSError:
            yield folder


def _sources() -> Iterator[str]:
    """Yield our files with their times and sizes."""
    for package in _OWN:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for folder, folders, files in os.walk(root):
                folders[:] = sorted(each for each in folders if each != "__pycache__")
                for path in (os.path.join(folder, file) for file in sorted(files)):
                    with suppress(OSError):  # gone meanwhile
                        status = os.stat(path)
                        yield f"{path} {status.st_mtime_ns} {status.st_size}"


def _digest(key: str, page: str) -> str:
    return hashlib.sha256(f"{key}\n\n{page}".encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: Path, key: str) -> str | None:
    try:
        digest, _, page = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return page if digest == _digest(key, page) else None


def _keep(path: Path, key: str, page: str) -> None:
    try:
        with atomic_write(path, "w") as file:
            file.write(f"{_digest(key, page)}\n{page}")
    except OSError:
        pass  # rendered again by the next call
