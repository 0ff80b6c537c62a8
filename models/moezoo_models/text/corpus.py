"""Where text comes from: a stream of documents named by one string.

| source                | documents                                                         |
|-----------------------|-------------------------------------------------------------------|
| ``stdlib``            | the Python standard library's own modules, without its tests      |
| ``FILE.txt``          | stretches of about 4 kB that end at a blank line                  |
| ``FILE.jsonl``        | one per row, from the row's text field                            |
| ``FILE.parquet``      | one per row, from the text column                                 |
| a folder or a glob    | its files of these kinds in the order of their names; a ``.txt``  |
|                       | file is one document then                                         |
| ``hf:NAME[:CONFIG]``  | one per row of a Hugging Face dataset's train split, streamed     |

Documents come in the same order every time. Empty ones are left out. Of rows with conversations
(lists of messages) a document is the conversation as JSON.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo_models.text.conversations import conversation_of
from moezoo_models.text.plain import LONGEST_STRETCH, read_whole, reading, reason_of, stretches
from moezoo_models.text.rows import field_of, read_jsonl, read_parquet

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl", ".parquet")

_STDLIB_EXCLUDED = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
}  # fmt: skip
_GLOB_CHARACTERS = "*?["
_READ_BYTES = 1 << 20


class Corpus(ABC):
    """A deterministic stream of documents.

    Attributes:
        source: the string that named it.
        total_bytes: about how much text there is, in bytes, for a progress bar; None if not known.
    """

    source: str
    total_bytes: int | None = None

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the non-empty documents.

        Raises:
            InputError: a file is not readable as text, or a row lacks the text field.
        """

    def place(self, number: int) -> str:
        """Return where a document is, counted from 0, for messages; it may be read for that."""
        return f"document {number + 1:,} of {self.source}"

    @abstractmethod
    def manifest(self) -> str:
        """Return a hash of the content: equal hashes mean equal documents."""


def open_corpus(source: str, text_field: str = "text", messages_field: str | None = None) -> Corpus:
    """Find the text that ``source`` names (see the table at the top of this module).

    Args:
        source: ``"stdlib"``, a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder, a glob, or
            ``"hf:NAME[:CONFIG]"``.
        text_field: field of a row that holds its text.
        messages_field: field of a row that holds a conversation, which is read instead.

    Raises:
        InputError: there is nothing there, or nothing of a known kind; or conversations are asked
            for where there are no rows.
    """
    messages = messages_field is not None
    field = text_field if messages_field is None else messages_field
    if not source:
        raise InputError(f"source: it is empty; give {STDLIB!r} or a path")
    if source == STDLIB:
        if messages:
            raise InputError("messages_field: source code has no rows; give a .jsonl file")
        return standard_library()
    if source.startswith(HUB_PREFIX):
        name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
        if not name:
            raise InputError(
                f"source: {source!r} names no dataset; write {HUB_PREFIX}NAME[:CONFIG]"
            )
        return HubCorpus(source, name, config or None, field, messages)
    path = Path(source).expanduser()
    if path.is_dir():
        return FileCorpus(source, path, _files_below(path, SUFFIXES), field, messages=messages)
    if path.is_file():
        _check_suffix(path)
        return FileCorpus(source, path.parent, [path], field, True, messages=messages)
    if any(character in source for character in _GLOB_CHARACTERS):
        root = _literal_part(path)
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in files if file.is_file()]
        for file in files:
            _check_suffix(file)
        return FileCorpus(source, root, files, field, messages=messages)
    raise InputError(
        f"source: {source!r} does not exist; give {STDLIB!r}, a {', '.join(SUFFIXES)} file, "
        f"a folder or glob of those, or {HUB_PREFIX}NAME"
    )


def standard_library() -> FileCorpus:
    """Return the source code of the running Python's standard library, without its tests.

    The content depends on the version of Python. A file that is not UTF-8 is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = _files_below(root, (".py",), _STDLIB_EXCLUDED)
    return FileCorpus(STDLIB, root, files, skip_unreadable=True)


class FileCorpus(Corpus):
    """Documents in local files.

    Args:
        source: the string that named them.
        root: folder that their names are relative to; moving it changes nothing.
        files: the files in order.
        text_field: field of a row in ``.jsonl`` and ``.parquet`` files that holds its text.
        split: whether a text file is cut into several documents.
        skip_unreadable: whether to leave out files that are not text, or not permitted to read.
        messages: whether that field holds conversations.

    Raises:
        InputError: there are no files, or no rows in one that should hold conversations.
    """

    def __init__(
        self,
        source: str,
        root: Path,
        files: list[Path],
        text_field: str = "text",
        split: bool = False,
        skip_unreadable: bool = False,
        messages: bool = False,
    ) -> None:
        if not files:
            raise InputError(
                f"source: {source!r} has no files to read ({', '.join(SUFFIXES)} are known)"
            )
        if messages and (text := [file for file in files if file.suffix == ".txt"]):
            raise InputError(
                f"messages_field: {text[0]} has no rows; give .jsonl or .parquet files alone"
            )
        self.messages = messages
        self.source = source
        self.root = root
        self.files = files
        self.text_field = text_field
        self.split = split
        self.skip_unreadable = skip_unreadable
        compressed = any(file.suffix == ".parquet" for file in files)
        self.total_bytes = None if compressed else sum(map(_size, files))

    def documents(self) -> Iterator[str]:
        """Yield the non-empty documents, file after file."""
        for file in self.files:
            yield from self._of_file(file)

    def place(self, number: int) -> str:
        """Return the file that holds a document, counted from 0, and which it is there."""
        left = number
        for file in self.files:
            found = sum(1 for _ in self._of_file(file))
            if left < found:
                return str(file) if found == 1 else f"document {left + 1:,} of {file}"
            left -= found
        return super().place(number)  # the files have changed

    def _of_file(self, file: Path) -> Iterator[str]:
        try:
            yield from filter(None, self._read(file))
        except InputError:
            if not self.skip_unreadable:
                raise

    def _read(self, file: Path) -> Iterator[str]:
        with reading(file):
            if file.suffix == ".jsonl":
                yield from read_jsonl(file, self.text_field, self.messages)
            elif file.suffix == ".parquet":
                yield from read_parquet(file, self.text_field, self.messages)
            elif self.split:
                with file.open(encoding="utf-8-sig", newline="") as stream:
                    yield from stretches(file, iter(lambda: stream.readline(LONGEST_STRETCH), ""))
            else:
                yield read_whole(file)

    def manifest(self) -> str:
        """Hash names, order and bytes of the files."""
        total = hashlib.sha256(f"files split={self.split}\n".encode())
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            total.update(f"{self._hash(file)} {name}\n".encode())
        return total.hexdigest()

    def _hash(self, file: Path) -> str:
        try:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            if self.skip_unreadable:
                return "unreadable"
            raise InputError(f"source: {file} cannot be read: {reason_of(error)}") from error


class HubCorpus(Corpus):
    """The train split of a Hugging Face dataset, streamed at a fixed revision.

    Args:
        source: the string that named it.
        name: a dataset on the Hub, or a local dataset folder.
        config: which of its configurations.
        text_field: column that holds the text.
        messages: whether it holds conversations instead.

    Raises:
        InputError: the ``datasets`` package or the dataset is missing.
    """

    def __init__(
        self,
        source: str,
        name: str,
        config: str | None,
        text_field: str,
        messages: bool = False,
    ) -> None:
        self.source = source
        self.name = name
        self.config = config
        self.text_field = text_field
        self._read = conversation_of if messages else field_of
        self._datasets = _import_datasets()
        self._revision = None if Path(name).is_dir() else self._resolve_revision()

    def documents(self) -> Iterator[str]:
        """Yield the non-empty rows."""
        rows = self._call(
            lambda: iter(
                self._datasets.load_dataset(
                    self.name,
                    self.config,
                    split="train",
                    streaming=True,
                    revision=self._revision,
                )
            )
        )
        number = 0
        while (row := self._call(lambda: next(rows, None))) is not None:
            number += 1
            if text := self._read(row, self.text_field, f"{self.source} row {number}"):
                yield text

    def manifest(self) -> str:
        """Hash the revision; of a local folder, its files."""
        if self._revision is not None:
            content = self._revision
        else:
            folder = Path(self.name)
            content = FileCorpus(self.source, folder, _files_below(folder)).manifest()
        return hashlib.sha256(f"hub {self.config} {content}".encode()).hexdigest()

    def _resolve_revision(self) -> str:
        from huggingface_hub import HfApi

        return str(self._call(lambda: HfApi().dataset_info(self.name).sha))

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        # Whatever the network, the Hub or a loading script raises, it is this source's fault.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            raise InputError(f"source: {self.source} cannot be loaded: {reason}") from error


def _files_below(
    root: Path, suffixes: tuple[str, ...] = (), excluded: set[str] | None = None
) -> list[Path]:
    """List the files under ``root`` by name, hidden ones left out; no suffixes mean all."""
    excluded = excluded or set()
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and name[0] != "."]
        visible = [name for name in names if name[0] != "."]
        found += [Path(folder, name) for name in visible if name.endswith(suffixes or "")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a dangling link, say: reading it will tell
        return 0


def _literal_part(pattern: Path) -> Path:
    """Return the folders of a glob pattern that stand before its first wildcard."""
    literal: list[str] = []
    for part in pattern.parts[:-1]:
        if any(character in part for character in _GLOB_CHARACTERS):
            break
        literal.append(part)
    return Path(*literal)


def _check_suffix(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise InputError(
            f"source: {file} is of an unknown kind; give a file that ends in {', '.join(SUFFIXES)}"
        )


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"source: {HUB_PREFIX} needs `pip install 'moezoo[data]'` (datasets)"
        ) from error
    return datasets
