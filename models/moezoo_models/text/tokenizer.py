"""Tokenizers: one small interface over Hugging Face tokenizer files and sentencepiece models.

A directory with ``tokenizer.json`` (ours, or byte-level BPE as of Qwen, Llama 3, GPT-2) is read by
transformers' ``AutoTokenizer``; one with only ``tokenizer.model`` by sentencepiece. Text is always
text: the spelling of a special token inside it (``"<|endoftext|>"``) is encoded letter by letter,
so that no document can forge a boundary.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moezoo.errors import InputError
from moezoo_models.cores import available_cores
from moezoo_models.files.gguf.copies import directory_of
from moezoo_models.files.model_files import check_inside, read_json
from moezoo_models.text.rayon import without_rayon

HUB_PREFIX = "hf:"
SENTENCEPIECE_FILE = "tokenizer.model"
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SETTINGS = ("special_tokens_map.json", "added_tokens.json", "config.json")
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_TRAINED = "trained_behind_bos"
"""Key of ``tokenizer_config.json``: the model was trained on texts behind its first token."""
_ENCODE_THREADS = min(8, available_cores())


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: largest id + 1, added tokens included.
        bos_id: id that opens a document, or None if the tokenizer knows none.
        eos_id: id that closes a document.
        threads: whether several threads may call :meth:`encode_here` at once, and gain by it.
        sentencepiece_model: contents of a ``tokenizer.model`` with the same ids, if there is one.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    threads: bool = False
    sentencepiece_model: bytes | None = None
    _trained = False

    @property
    def opening(self) -> list[int]:
        """Ids that stand before a text: ``bos_id``, or none.

        Of a Hugging Face tokenizer they are what ``tokenizer(text)`` puts there, of a model trained
        here what stood before each document.
        """
        if self.bos_id is None or not (self._trained or self._adds_bos()):
            return []
        return [self.bos_id]

    @property
    def start_id(self) -> int:
        """Id from which the first token of a text is predicted: ``bos_id``, or ``eos_id``."""
        return (self.opening or [self.eos_id])[0]

    def set_trained(self) -> None:
        """Put texts behind ``bos_id``, as documents are that a model is trained on here."""
        self._trained = True

    def _adds_bos(self) -> bool:
        return True

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, with no special tokens added and none read from the text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on several threads."""

    def encode_here(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on the calling thread."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special tokens (``eos_id`` …) are left out."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the files from which :func:`load_tokenizer` makes an equal tokenizer."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when any id of any text could change."""


class HuggingFaceTokenizer(Tokenizer):
    """A transformers tokenizer.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase``.
        sentencepiece_model: bytes of a ``tokenizer.model`` with the same ids, written along on
            ``save`` for programs that read that format.

    Raises:
        InputError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, sentencepiece_model: bytes | None = None) -> None:
        self.hf = tokenizer
        self.sentencepiece_model = sentencepiece_model
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = _required_eos(tokenizer.eos_token_id)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.threads = self._backend is not None
        self._trained = bool(getattr(tokenizer, "init_kwargs", {}).get(_TRAINED))
        if self._backend is not None:
            self._backend.encode_special_tokens = True
            # Either would change texts without a word, and padding to a given length has no bound.
            self._backend.no_padding()
            self._backend.no_truncation()
            if getattr(self._backend.model, "dropout", None) is not None:
                # For training on many spellings of a text: each time another one would come out.
                self._backend.model.dropout = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, special tokens neither added nor recognised."""
        if self._backend is None:
            return list(self.hf.encode(text, add_special_tokens=False, split_special_tokens=True))
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def set_trained(self) -> None:
        """As for any tokenizer; a key in its files says so."""
        super().set_trained()
        if self.opening:
            self.hf.init_kwargs[_TRAINED] = True

    def _adds_bos(self) -> bool:
        plain, whole = self.encode("a"), self.encode_as_model_input("a")
        return whole[:1] == [self.bos_id] != plain[:1]

    def encode_as_model_input(self, text: str) -> list[int]:
        """Return the ids of ``text`` with what the tokenizer puts around a text."""
        if self._backend is None:
            return list(self.hf.encode(text, split_special_tokens=True))
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on several threads."""
        if self._backend is None:
            return [self.encode(text) for text in texts]
        # The fast call, which skips the character offsets, exists for batches only.
        encode_fast = self._backend.encode_batch_fast
        with without_rayon(), ThreadPoolExecutor(_ENCODE_THREADS) as pool:
            encodings = pool.map(lambda text: encode_fast([text], add_special_tokens=False), texts)
            return [encoding.ids for (encoding,) in encodings]

    def encode_here(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on the calling thread."""
        if self._backend is None:
            return super().encode_here(texts)
        with without_rayon():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        text = self.hf.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def save(self, directory: str | Path) -> None:
        """Write the Hugging Face files, and ``tokenizer.model`` where there is one."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer-") as temporary:
            self.hf.save_pretrained(temporary)
            if self.sentencepiece_model is not None:
                Path(temporary, SENTENCEPIECE_FILE).write_bytes(self.sentencepiece_model)
            for file in sorted(Path(temporary).iterdir()):
                shutil.move(file, directory / file.name)

    def fingerprint(self) -> str:
        """Hash the whole definition, or the vocabulary of a tokenizer written in Python."""
        if self._backend is not None:
            definition = self._backend.to_str()
        else:
            definition = json.dumps([type(self.hf).__name__, sorted(self.hf.get_vocab().items())])
        return _sha256(f"{definition} {self.bos_id} {self.eos_id}".encode())


class SentencePieceTokenizer(Tokenizer):
    """A bare sentencepiece model.

    Sentencepiece writes a space as U+2581 (``▁``), so that one character of a text comes back as a
    space; everything else is as the model's own normalisation has it.

    Args:
        model: the serialised model.

    Raises:
        InputError: the bytes are no sentencepiece model, or it has no end-of-text token.
    """

    threads = True

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                "tokenizer: a sentencepiece model needs `pip install sentencepiece`"
            ) from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise InputError(
                f"tokenizer: {SENTENCEPIECE_FILE} is not a sentencepiece model; copy it again"
            ) from error
        self.sentencepiece_model: bytes = model
        self.vocab_size = self._processor.get_piece_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = _required_eos(eos if eos >= 0 else None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on several threads."""
        return list(self._processor.encode(list(texts), num_threads=_ENCODE_THREADS))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; control tokens have none."""
        return str(self._processor.decode(list(ids)))

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.model``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{SENTENCEPIECE_FILE}"
        temporary.write_bytes(self.sentencepiece_model)
        temporary.replace(directory / SENTENCEPIECE_FILE)

    def fingerprint(self) -> str:
        """Hash the model."""
        return _sha256(self.sentencepiece_model)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory, or by name from the Hugging Face Hub.

    Args:
        path: directory that holds ``tokenizer.json`` (or other Hugging Face tokenizer files) or
            ``tokenizer.model`` (sentencepiece), a GGUF file, ``"hf:NAME"``, or
            ``"hf:NAME@REVISION"``.

    Raises:
        InputError: the directory or the files in it are missing, broken or without an
            end-of-text token.
    """
    if str(path).startswith(HUB_PREFIX) and "@" not in str(path):
        return HuggingFaceTokenizer(_auto_tokenizer(str(path).removeprefix(HUB_PREFIX)))
    if "\0" in str(path):
        raise InputError(f"tokenizer: {str(path)!r} holds a NUL character, which no path has")
    with _told(path):
        directory = directory_of(Path(path))
    if not directory.is_dir():
        raise InputError(
            f"tokenizer: {directory} is not a directory; give one that holds tokenizer.json or "
            f"{SENTENCEPIECE_FILE}, or {HUB_PREFIX}NAME"
        )
    model_file = directory / SENTENCEPIECE_FILE
    with _told(model_file):
        model = model_file.read_bytes() if model_file.is_file() else None
    if (directory / "tokenizer.json").is_file() or model is None:
        if not any((directory / name).is_file() for name in _HUGGING_FACE_FILES):
            raise InputError(
                f"tokenizer: {directory} holds neither tokenizer.json nor {SENTENCEPIECE_FILE}; "
                "give a directory made by `moezoo prepare` or a Hugging Face checkpoint"
            )
        with _told(directory):
            _check_files(directory)
            return HuggingFaceTokenizer(_auto_tokenizer(str(directory), local=True), model)
    with _told(model_file):
        return SentencePieceTokenizer(model)


def _auto_tokenizer(name: str, local: bool = False) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError("tokenizer: Hugging Face files need `pip install transformers`") from error
    with _told(name):
        # Without the last argument transformers asks whether to run code that the files name.
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=local, trust_remote_code=False
        )
    for how_it_was_found in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_found, None)  # it would be saved along
    return tokenizer


def _check_files(directory: Path) -> None:
    """Read the settings that transformers reads without bounds, and see that no file is elsewhere.

    Raises:
        InputError: a file is no JSON object, or a link out of the directory.
    """
    for name in (*_HUGGING_FACE_FILES, SENTENCEPIECE_FILE, *_SETTINGS):
        if (directory / name).is_file():
            check_inside(directory / name)
    for name in ("tokenizer_config.json", *_SETTINGS):
        if (directory / name).is_file():
            read_json(directory / name)
    _check_merges(directory / "tokenizer.json")


def _check_merges(file: Path) -> None:
    """See that merges begin with the prefix that the tokenizers library cuts off unseen.

    Raises:
        InputError: one does not.
    """
    # Few files have such a prefix, and to parse all of a large one takes a second.
    if not (file.is_file() and _PREFIX.search(file.read_bytes())):
        return
    model = read_json(file).get("model")
    if not isinstance(model, dict):
        return  # what the library says
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not (isinstance(prefix, str) and isinstance(merges, list)):
        return  # likewise
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        right = parts[-1] if isinstance(parts, list) and parts else None
        if not (isinstance(right, str) and right.startswith(prefix)):
            raise InputError(
                f"{file}: continuing_subword_prefix: '{prefix[:40]}' does not begin all second "
                "parts of its merges; copy the file again"
            )


@contextmanager
def _told(what: str | Path) -> Iterator[None]:
    """Turn errors about a tokenizer's files into one line.

    Raises:
        InputError: for whatever the libraries raise.
    """
    try:
        yield
    except InputError as error:
        message = str(error).removeprefix("checkpoint: ").removeprefix("tokenizer: ")
        raise InputError(f"tokenizer: {message}") from error
    except OSError as error:
        reason = error.strerror or str(error).strip().split("\n")[0][:200]
        raise InputError(f"tokenizer: {what} cannot be loaded: {reason}") from error
    except BaseException as error:
        # The tokenizers library raises bare Exceptions for a broken tokenizer.json, and where it
        # stumbles one that is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(f"tokenizer: {what} cannot be loaded: {reason}") from error


def _required_eos(eos_id: int | None) -> int:
    if eos_id is None:
        raise InputError(
            "tokenizer: it has no end-of-text token to put between documents; "
            "set eos_token in its tokenizer_config.json"
        )
    return eos_id


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
