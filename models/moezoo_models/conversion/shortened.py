"""A dense checkpoint with fewer layers: written, measured, and trained on with ``--recover``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch

from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carving import loaded_perplexity
from moezoo_models.conversion.checkpoint import NewCheckpoint
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.recovery import Recovery, recovery_table
from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import check_target, parse_size


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """A dense checkpoint with fewer layers, as its report describes it.

    Attributes:
        method: ``drop-layers`` or ``fuse-layers``.
        options: what was asked for.
        source: architecture and fingerprint of the dense model.
        target: SHA-256 of the files of weights.
        calibration: the text.
        perplexity: on held-out text, ``dense`` and :attr:`verb`, untrained; of the files as they
            load.
        recovery: of the training, or None.
        verb: what became of the layers.
    """

    verb: ClassVar[str]
    method: str
    options: dict[str, Any]
    source: dict[str, Any]
    target: dict[str, Any]
    calibration: dict[str, Any]
    perplexity: dict[str, float]
    recovery: dict[str, Any] | None = None

    def recovered(self, files: dict[str, str], recovery: dict[str, Any]) -> Self:
        """Return the report of the same model, trained on.

        Args:
            files: SHA-256 of the files of weights.
            recovery: what is to be said of the training.
        """
        return replace(self, target={"sha256": files}, recovery=recovery)


R = TypeVar("R", bound=Shortened)


@dataclass(frozen=True, eq=False)
class Shortening:
    """One call of a command that makes a checkpoint with fewer layers.

    Attributes:
        command: its name.
        source: the dense model.
        target: directory to make.
        text: for measurements, perplexities and the training.
        options: for the report; they decide, with the source and the text, what is made.
        recovery: options of the training; there is one if the text has tokens for it.
        max_shard_size: as in ``5GB``.
        loads: whether to load the result and measure its perplexity.
        force: replace a checkpoint that is there.
    """

    command: str
    source: Source
    target: Path
    text: Calibration
    options: dict[str, Any]
    recovery: RecoveryOptions
    max_shard_size: str
    loads: bool
    force: bool

    def run(
        self, kind: type[R], make: Callable[[], R], say: Callable[[R], None], device: torch.device
    ) -> R:
        """Make the checkpoint unless it is there, untrained, and train it if that is wanted.

        Args:
            kind: the report's class.
            make: writes the checkpoint, by :meth:`write`, and returns its report.
            say: prints the report.
            device: where to train.

        Raises:
            InputError: there is no room, the target holds something else, or the training went
                wrong.
        """
        parse_size(self.max_shard_size)  # refused before anything is measured
        made = None
        training: Recovery[R] | None = None
        if self.text.recovery.numel():
            training = Recovery(self.source, self.target, self.text, self.recovery, self.command)
            training.check(self.source.dtype)
            made = self._untrained(kind, training)
        if made is None:
            check_target(self.target, self.force)
            made = make()
        say(made)
        if training is None:
            return made
        recovered = training.run(made, device, self.max_shard_size)
        print(_summary(recovered))
        return recovered

    def _untrained(self, kind: type[R], training: Recovery[R]) -> R | None:
        """Return the report of the target, if it is what this would make."""
        found = training.earlier(self.options)
        if found is None or found["recovery"] is not None:
            return None
        if found["calibration"] != self.text.describe():
            return None
        return kind(**{each.name: found[each.name] for each in fields(kind)})

    def write(
        self,
        kind: type[R],
        kept: list[int],
        outputs: Iterable[Output],
        config: dict[str, Any],
        change: str,
        **measured: Any,
    ) -> R:
        """Write the checkpoint atomically.

        Args:
            kind: the report's class.
            kept: numbers in the dense model of the layers that stay.
            outputs: its tensors.
            config: its ``config.json``.
            change: what was changed, in one sentence; Markdown.
            measured: the report's own fields.
        """
        new = NewCheckpoint(
            self.command, [self.source], self.target, outputs, self.max_shard_size, self.force
        )
        with new.opened([self.options, kept, config]):
            new.write(config, change)
            perplexity = {}
            if self.loads:
                dense = loaded_perplexity(self.source.directory, self.text, sound=False)
                fewer = loaded_perplexity(new.directory, self.text)
                perplexity = {"dense": dense, kind.verb: fewer}
            made = kind(
                method=self.command,
                options=self.options,
                source={
                    "architecture": self.source.family,
                    "sha256": self.source.fingerprint(),
                },
                target={"sha256": new.sha256},
                calibration=self.text.describe(),
                perplexity=perplexity,
                **measured,
            )
            new.report(made)
        return made


def say_perplexity(made: Shortened) -> None:
    """Print the perplexities of an untrained checkpoint, if they were measured."""
    if found := made.perplexity:
        print(f"perplexity on {made.calibration['held_out_tokens']:,} held-out tokens")
        for name, value in found.items():
            ratio = "" if name == "dense" else f"  × {value / found['dense']:.3f}"
            print(f"  {name:<12}{value:>10.4g}{ratio}")


def _summary(made: Shortened) -> str:
    """Return the figures of a recovery in one table with those before it."""
    recovery = made.recovery
    assert recovery is not None
    rows: list[tuple[str, float, float | None]] = [("dense", recovery["dense"], None)]
    if made.perplexity:
        rows.append((made.verb, made.perplexity[made.verb], None))
    recovered = recovery["figures"]["recovered"]
    rows.append(("the same, recovered", recovered["perplexity"], recovered["error"]))
    return recovery_table(rows, recovery["tokens"], made.calibration["held_out_tokens"])
