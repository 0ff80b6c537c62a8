"""Asking a run to stop: SIGTERM, and Ctrl-C once or twice."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moezoo_models.checkpoints.atomic import is_there

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""Names for users of the signals that ask a run to stop."""

_NOTICE = b"\nstopping when this step is finished and saved; Ctrl-C again stops at once\n"
_SAME = 1.0
"""Seconds in which a second SIGINT is the same Ctrl-C, passed on by a launcher."""


class StopSignals:
    """Note signals that ask to stop, in place of what they would do otherwise.

    Python's own handler, which a second Ctrl-C reaches, would stop in the middle of a step;
    Lightning's for SIGTERM would leave several processes there.

    Attributes:
        asked: the signal that came first; None as long as none has.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted: float | None = None
        self._launched = self._first = False

    def install(self, launched: bool, first: bool) -> None:
        """Take the signals, in the main thread; a SIGINT that is ignored stays so.

        Args:
            launched: whether there are several processes, to which a launcher passes signals on;
                ``torchrun`` does so with a single one too.
            first: whether this process says that it is stopping.
        """
        self._launched = launched or "TORCHELASTIC_RUN_ID" in os.environ
        self._first = first
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in (
            (signal.SIGTERM, self._terminate),
            (signal.SIGINT, self._interrupt),
        ):
            before = signal.getsignal(number)
            if number == signal.SIGINT and before in (signal.SIG_IGN, None):
                continue  # as the shell wants it for jobs in the background
            self._before[number] = before
            signal.signal(number, handler)

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def _terminate(self, *_: Any) -> None:
        self.asked = self.asked or signal.SIGTERM

    def _interrupt(self, *_: Any) -> None:
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            self.asked = self.asked or signal.SIGINT
            if self._first:
                os.write(2, _NOTICE)  # print() may be what was interrupted
        elif not self._launched or now - self._interrupted > _SAME:
            raise KeyboardInterrupt


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt where Lightning answers Ctrl-C by ending the process with 1."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if main and before is not None:
            signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


def resume_command(output: Path, name: str = "last") -> str:
    """Return the command that goes on with a run, by the configuration that it has written."""
    config = output / "config.yaml"
    given = f"--config {shlex.quote(str(config))}" if config.exists() else "…"
    return f"moezoo fit {given} --ckpt_path {name}"


def say_interrupted(output: Path) -> str:
    """Return how an interrupted run can go on."""
    if is_there(output / "checkpoints" / "last.ckpt"):
        return f"interrupted; go on from the last checkpoint with: {resume_command(output)}"
    return "interrupted before the first checkpoint; the same command begins again"
