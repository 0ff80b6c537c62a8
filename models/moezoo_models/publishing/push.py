"""`moezoo push`: a model directory to the Hugging Face Hub."""

from __future__ import annotations

import glob
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moezoo.command.messages import size
from moezoo.errors import InputError
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.companions import README, is_license
from moezoo_models.files.hub import WANTED, is_hub_name
from moezoo_models.files.model_files import (
    CONFIG,
    check_inside,
    check_weights,
    existing,
    read_headers,
    read_json,
    weight_files,
)
from moezoo_models.publishing.card import card

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_FOLDERS = ("additional_chat_templates", "chat_templates")


def push(
    directory: str | Path,
    name: str,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Send a model directory to the Hugging Face Hub, in one commit.

    Weights in safetensors, configurations, tokenizer, licences and README are sent, and the code
    that `moezoo export --with_code` wrote; nothing else that may lie there. Where there is no
    README, a model card is written into the directory, with sizes, how to load it, and the figures
    of the run (``report.json`` beside ``model/``) or of the conversion. The repository is made if
    there is none.

    You have to be logged in: `hf auth login`, or the variable HF_TOKEN.

    Args:
        directory: of the model, e.g. ``runs/moe/model``.
        name: of the repository, ``ORG/NAME``.
        private: whether others cannot see the repository, if it is made now.
        revision: branch to send to; default: main.
        message: of the commit.
        dry_run: print what would be sent, and send and write nothing.

    Returns:
        The files' names.

    Raises:
        InputError: the directory is no whole model, the name is none, nobody is logged in, or the
            Hub refuses.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"name: {name!r} is no name of a repository; write ORG/NAME")
    if is_hub_name(directory):
        raise InputError(f"directory: {directory} is on the Hub already; give a directory")
    place = Path(directory)
    source = existing(place)
    if source != place:
        raise InputError(f"directory: {directory} is a GGUF file; give a directory of safetensors")
    files = weight_files(source)
    tensors = read_headers(files)
    check_weights(files)
    sent, left = _sorted(source)
    text = None if README in sent else card(source, name, tensors)
    api = None if dry_run else _api()
    _print(source, name, private, revision, (sent, left), text)
    if api is not None:
        _send(api, source, name, private, revision, message, sent, text)
        print(f"sent to https://huggingface.co/{name}")
    else:
        print("nothing was sent (dry_run)")
    return sent if text is None else sorted([*sent, README])


def _sorted(source: Path) -> tuple[list[str], list[str]]:
    """Return which files of a directory are sent, and which are left.

    Raises:
        InputError: one that would be sent is a link out of the directory.
    """
    raw = read_json(source / CONFIG)
    automatic = raw.get("auto_map")
    named = automatic.values() if isinstance(automatic, dict) else ()
    code = {f"{str(each).partition('.')[0]}.py" for each in named}
    sent, left = [], []
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        relative = path.relative_to(source)
        inner = len(relative.parts) == 2 and relative.parts[0] in _FOLDERS
        known = path.name in code or is_license(path.name) or path.suffix == ".md"
        known = known or any(fnmatch(path.name, pattern) for pattern in WANTED)
        hidden = any(part.startswith(".") for part in relative.parts)
        if known and not hidden and (inner or len(relative.parts) == 1):
            check_inside(path)
            sent.append(relative.as_posix())
        else:
            left.append(relative.as_posix())
    return sent, left


def _api() -> Any:
    """Return the Hub's interface for who is logged in.

    Raises:
        InputError: nobody is.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(
            "token: there is none, so the Hub does not know who sends this; run `hf auth login`, "
            "or set HF_TOKEN"
        )
    return HfApi()


def _send(
    api: Any,
    source: Path,
    name: str,
    private: bool,
    revision: str | None,
    message: str | None,
    sent: list[str],
    text: str | None,
) -> None:
    from huggingface_hub.errors import HTTPError

    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        if text is not None:
            with atomic_write(source / README, "w") as file:
                file.write(text)
            sent = [*sent, README]
        api.upload_folder(
            repo_id=name,
            folder_path=source,
            revision=revision,
            allow_patterns=[glob.escape(each) for each in sent],
            commit_message=message or "Send a model by moezoo push",
        )
    except (HTTPError, ValueError) as error:  # HfHubHTTPError and HFValidationError are such
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"name: the Hub did not take {name}: {reason}; see that you may write there"
        ) from error


def _print(
    source: Path,
    name: str,
    private: bool,
    revision: str | None,
    files: tuple[list[str], list[str]],
    text: str | None,
) -> None:
    sent, left = files
    sizes = {each: (source / each).stat().st_size for each in sent}
    new = {} if text is None else {README: len(text.encode())}
    seen = "private" if private else "public"
    total = size(sum(sizes.values()) + sum(new.values()))
    print(f"{name}, {revision or 'main'}, {seen} if it is new: {len(sizes | new)} files, {total}")
    for each, count in sorted((sizes | new).items()):
        also = ", a model card, as there is none" if each in new else ""
        print(f"  {each:<36}{size(count):>10}{also}")
    if left:
        print(f"left here: {', '.join(left)}")
