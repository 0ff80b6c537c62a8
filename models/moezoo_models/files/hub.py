"""Models on the Hugging Face Hub, ``hf:ORG/NAME[@REVISION]``, as directories in its own cache.

What is fetched are weights in safetensors, JSON, tokenizers, licences and the README: no code and
nothing pickled. Without a network, or with ``HF_HUB_OFFLINE=1``, what is in the cache is taken.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path

from moezoo.errors import InputError

HUB_PREFIX = "hf:"
"""What the names of models on the Hub begin with."""

WANTED = (
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that are fetched, of those beside ``config.json``."""

UNWANTED = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.gguf")
"""Files that are not, whatever they are called besides: folders, code, pickles."""

_NAME = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)


def is_hub_name(path: Path | str) -> bool:
    """Return whether a path stands for a model on the Hub."""
    return str(path).startswith(HUB_PREFIX)


def fetched(path: Path | str) -> Path:
    """Return the directory of a model on the Hub, fetched now if it is not in the cache.

    Args:
        path: ``hf:ORG/NAME``, or ``hf:ORG/NAME@REVISION`` for a branch, tag or commit.

    Raises:
        InputError: there is no such model or revision, one may not read it, or it can neither be
            fetched nor is in the cache.
    """
    name, at, revision = str(path).removeprefix(HUB_PREFIX).partition("@")
    if not _NAME.fullmatch(name) or "\0" in str(path) or (at and not revision):
        raise InputError(
            f"checkpoint: {str(path)!r} names no model of the Hub; write {HUB_PREFIX}ORG/NAME, or "
            f"{HUB_PREFIX}ORG/NAME@REVISION"
        )
    return _snapshot(name, revision or None)


@lru_cache(maxsize=16)
def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"{HUB_PREFIX}{name}" + (f"@{revision}" if revision else "")
    try:
        place = snapshot_download(
            name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except GatedRepoError as error:
        raise InputError(
            f"checkpoint: {shown} is gated; accept its terms on its page, and log in by "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"checkpoint: {shown} is not on the Hub, or is private; correct the name, or log in by "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"checkpoint: {shown} has no revision '{revision or 'main'}'; name a branch, tag or "
            "commit that it has"
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"checkpoint: {shown} is not in the cache as a whole, and the Hub cannot be reached; "
            "connect, or give a directory"
        ) from error
    except (HFValidationError, HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"checkpoint: {shown} cannot be fetched: {reason}") from error
    print(f"{shown}: {place}", file=sys.stderr, flush=True)
    return Path(place)
