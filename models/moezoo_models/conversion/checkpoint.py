"""Writing a converted checkpoint: all commands that make a directory of a dense one do it here.

Weights are planned before the first byte, then written with the index, ``config.json``, the files
beside the weights and the report into a hidden directory, which takes the target's place at the
end. A killed run is continued where the same command makes the same thing of the same models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import DownloadColumn, TransferSpeedColumn

from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.directory import CONFIG
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import (
    Workspace,
    check_space,
    check_target,
    parse_size,
    plan_shards,
    workspace,
)
from moezoo_models.progress import progress_bar

REPORT = "moezoo_conversion.json"
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)
_COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")
_FORMAT = 3
"""Of what is written; another number never continues an earlier run's files."""
_SCRATCH = "calibration"


class NewCheckpoint:
    """A checkpoint to be made of one or several dense models.

    Args:
        command: that makes it.
        sources: the models; tokenizer, chat template and generation settings are the first's.
        target: directory to make.
        outputs: its tensors, whose values are asked for when they are written.
        max_shard_size: start another file when one exceeds this, as in ``5GB``.
        force: replace a checkpoint that is there.

    Attributes:
        parameters: numbers in its tensors.
        bytes: size of its tensors.

    Raises:
        InputError: the size is none, or the target holds something.
    """

    def __init__(
        self,
        command: str,
        sources: Sequence[Source],
        target: Path,
        outputs: Iterable[Output],
        max_shard_size: str,
        force: bool,
    ) -> None:
        check_target(target, force)
        self._command, self._sources, self._target = command, sources, target
        self._max_shard_size, self._force = max_shard_size, force
        self._shards = plan_shards(outputs, parse_size(max_shard_size))
        shapes = [each.shape for shard in self._shards for each in shard.outputs]
        self.parameters = sum(torch.Size(shape).numel() for shape in shapes)
        self.bytes = sum(shard.bytes for shard in self._shards)
        self._work: Workspace | None = None

    @contextmanager
    def opened(self, decides: Sequence[Any], scratch_bytes: int = 0) -> Iterator[None]:
        """Open the directory to write to, which takes the target's place at the end.

        Args:
            decides: what the contents depend on, but for the command, the models and the size of
                files; as JSON holds it, else by its ``str``. A run with other ones starts anew.
            scratch_bytes: room needed in :attr:`scratch`.

        Raises:
            InputError: there is no room, or another process is writing the target.
        """
        check_space(self._target, self.bytes + scratch_bytes)
        with workspace(self._target, self._identity(decides), self._force) as self._work:
            yield
            shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def directory(self) -> Path:
        """Where it is written; only while it is open."""
        return self._opened.directory

    @property
    def scratch(self) -> Path:
        """A directory for files that are needed until the end; a continued run finds them there."""
        return self.directory / _SCRATCH

    @property
    def sha256(self) -> dict[str, str]:
        """Hashes of the files of weights, by name."""
        return dict(sorted(self._opened.done.items()))

    def write(self, config: dict[str, Any], change: str) -> None:
        """Write everything but the report.

        Args:
            config: its ``config.json``.
            change: what was changed, in one sentence; Markdown.
        """
        work = self._opened
        with progress_bar(DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("writing", total=self.bytes)
            for shard in self._shards:
                work.write(shard, partial(bar.advance, task))
        work.write_index(self._shards)
        work.write_json(CONFIG, config)
        directories = [source.directory for source in self._sources]
        change = f"{change} `{REPORT}` has the options."
        _copy_files(directories, work.directory, change, self._target)

    def report(self, made: Any) -> None:
        """Write the report, a dataclass."""
        self._opened.write_json(REPORT, asdict(made))

    @property
    def _opened(self) -> Workspace:
        assert self._work is not None, "open it first"
        return self._work

    def _identity(self, decides: Sequence[Any]) -> str:
        """Hash what decides the contents, so that an interrupted run can be told from another."""
        models = [part for source in self._sources for part in (source.raw, source.stamp())]
        everything = [_FORMAT, torch.__version__, self._command, models, self._max_shard_size]
        text = json.dumps([*everything, *decides], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _copy_files(sources: Sequence[Path], fresh: Path, change: str, replaced: Path) -> None:
    """Copy what is beside the weights.

    Tokenizer, chat template and generation settings are the first model's, byte for byte; licences
    and READMEs as :func:`moezoo_models.checkpoints.companions.carry_over` does.
    """
    for name in _COPIED_FILES:
        if (sources[0] / name).is_file():
            shutil.copyfile(sources[0] / name, fresh / name)
    for name in _COPIED_FOLDERS:
        if (sources[0] / name).is_dir():
            shutil.copytree(sources[0] / name, fresh / name, dirs_exist_ok=True)
    carry_over(sources, fresh, change, replaced)
