"""Runs texts of Python in processes that have run nothing but a first text, once for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from forked import PATHS

EACH = """
import atexit, gc, json, os, sys, traceback
gc.freeze()
for number, code in enumerate(json.load(sys.stdin)):
    if not (child := os.fork()):
        os.dup2(os.open(str(number), os.O_WRONLY | os.O_CREAT), 1)
        status = 0
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)  # to take the interpreter down would copy all that was imported
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {code}")
"""


def run_each(folder: Path, first: str, codes: list[str]) -> list[str]:
    """Run each text in a process that has run but a first one, and return what they print.

    Args:
        folder: an empty one.
        first: what is common to them, such as an import of torch, which takes seconds.
        codes: the texts; each ends as a program does.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{EACH}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
        cwd=folder,
        input=json.dumps(codes),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / str(number)).read_text() for number in range(len(codes))]
