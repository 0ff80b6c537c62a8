"""Runs commands and programs in children of one process that has imported everything already.

Fifty runs that are killed, or two ranks, then cost what they compute, and not an import of torch
and Lightning each as well. This file is both sides: what the tests call, and, started as a program,
the process that forks.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / part) for part in (".", "kernels", "models", "train", "tests/reliability")]
LIMIT = 300.0
"""Seconds after which a child is taken to hang."""

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}

CALL = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("called", sys.argv[1])
sys.modules["called"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, sys.argv[2])(int(os.environ["RANK"]), *sys.argv[3:])
"""

NEVER = ("__main__", "__mp_main__", "torch._inductor")
"""Modules that are not imported beforehand, as they start threads or are no files."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit status; minus the number of the signal that ended it.
        output: what it wrote to standard output and standard error.
        seconds: how long it ran.
        operations: how often it changed the file system under its folder; 0 if it was killed.
    """

    code: int
    output: str
    seconds: float
    operations: int


class Server:
    """The process that forks.

    Args:
        folder: where it keeps what its children say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(PATHS),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: Any, folder: Path, **order: Any) -> Ended:
        """Run a command or a program in a folder, and wait for its end.

        Args:
            arguments: of the ``moezoo`` command; or ``save`` to write checkpoints without end.
            folder: where it writes, and its current directory.
            order: what else it is, as ``program`` or ``code``, and what is to happen to it, see
                :func:`obey` and :func:`wait`; to one ``rank`` only, if that is given. One that is
                ``absent`` is not started.
        """
        return self.run_ranks(1, *arguments, folder=folder, **order)[0]

    def run_ranks(self, ranks: int, *arguments: Any, folder: Path, **order: Any) -> list[Ended]:
        """Run a command as a cluster does: one process per rank, told by its environment."""
        logs = [self._folder / f"output{rank}.txt" for rank in range(ranks)]
        order |= {"arguments": [*map(str, arguments)], "folder": str(folder)}
        order["logs"] = [*map(str, logs)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        logs = [log for rank, log in enumerate(logs) if rank != order.get("absent")]
        return [Ended(**values, **_read(log)) for values, log in zip(ended, logs, strict=True)]

    def call_ranks(
        self, ranks: int, function: Callable[..., None], *arguments: Any, folder: Path
    ) -> None:
        """Call a function of a file in processes that are ranks; each gets its rank first."""
        words = (function.__code__.co_filename, function.__name__, *arguments)
        for ended in self.run_ranks(ranks, *words, folder=folder, code=CALL):
            assert ended.code == 0, ended.output

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=LIMIT)


def _read(log: Path) -> dict[str, Any]:
    """Part what a child wrote from the count behind it, which is missing if it was killed."""
    output, ended, count = log.read_text().partition("\0")
    return {"output": output, "operations": int(count) if ended else 0}


def serve() -> None:
    """Fork children for every line that is read, and say how they ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    import torch

    from moezoo.__main__ import COMMANDS, main

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        words = order["arguments"]
        if not order.keys() & {"program", "code"}:
            asked = (COMMANDS.get(" ".join(words[:count])) for count in (1, 2))
            import_all([each.function.partition(":")[0] for each in asked if each])
        import_all(order.get("imports", []))
        children: dict[int, dict[str, Any]] = {}
        port = free_port()
        for rank, log in enumerate(order["logs"]):
            modules(log).unlink(missing_ok=True)
            if rank == order.get("absent"):
                continue
            own = of_rank(rank, order)
            child = os.fork()
            if child == 0:
                if len(order["logs"]) > 1:
                    os.environ |= as_rank(rank, len(order["logs"]), port)
                obey(own, log, main)
            children[child] = own
        print(json.dumps(wait(children)), file=answers, flush=True)
        for log in order["logs"]:
            with suppress(OSError):
                import_all(modules(log).read_text().split("\n"))


def modules(log: str) -> Path:
    """Return where a child writes which modules it has imported."""
    return Path(f"{log}.modules")


def import_all(names: list[str]) -> None:
    """Import what children have imported or will, so that the next ones need not."""
    new = [name for name in names if name not in sys.modules and not name.startswith(NEVER)]
    for name in new:
        with suppress(Exception):  # some are made, and none is needed
            importlib.import_module(name)
    if new:
        if throughput := sys.modules.get("moezoo_train.measure.throughput"):
            throughput.PROBE_SECONDS = 0.0  # as in tests/conftest.py
        gc.collect()
        gc.freeze()  # nothing of it is copied because a child's collector looks at it


def of_rank(rank: int, order: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is to happen to another rank."""
    if order.get("rank", rank) == rank:
        return order
    return {name: value for name, value in order.items() if name not in {"seconds", "operation"}}


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def as_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables by which a launcher tells a process who it is."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "run",
    }


def wait(children: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Wait for all children, each with its order.

    After the ``seconds`` of its order, a child is sent the signal ``number``; after ``limit``
    seconds it is killed. Where only stopped ones are left, they are killed, as a launcher does.
    """
    started = time.monotonic()
    ended: dict[int, dict[str, Any]] = {}
    sent, stopped = set(), set()
    while left := [child for child in children if child not in ended]:
        passed = time.monotonic() - started
        for child in left:
            order = children[child]
            found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                stopped.add(child)
            elif found:
                code = os.waitstatus_to_exitcode(status)
                ended[child] = {"code": code, "seconds": passed}
            elif passed > order.get("limit", LIMIT) or stopped.issuperset(left):
                os.kill(child, signal.SIGKILL)
            elif passed > order.get("seconds", math.inf) and child not in sent:
                os.kill(child, order.get("number", signal.SIGKILL))
                sent.add(child)
        time.sleep(0.001)
    return [ended[child] for child in children]


def obey(order: dict[str, Any], log: str, main: Any) -> NoReturn:
    """Be the child.

    The order may hold ``program``: a file to run instead of a command, or ``code``: text to run;
    ``environment``: variables; ``imports``: modules that the server imports before it forks.

    It may hold ``operation`` and ``delay``: die so many seconds after the n-th change of the file
    system; ``file_limit``: bytes that a file may have; ``memory``: bytes of memory that may be
    added; ``processor``: seconds of a core that it may take; ``unprivileged``: do not write what
    permissions forbid, although root could; ``shard_bytes``: of ``moezoo prepare``; ``group``: be
    a process group, as a terminal's job is.
    """
    known = set(sys.modules)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(order["folder"])
    os.environ |= order.get("environment", {})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    code = 1
    watch = Watch(order["folder"], order.get("operation"), order.get("delay", 0.0))
    try:
        if "file_limit" in order:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
        if "memory" in order:
            limit_memory(order["memory"])
        if "processor" in order:
            resource.setrlimit(resource.RLIMIT_CPU, (order["processor"],) * 2)
        if order.get("unprivileged"):
            drop_privileges()
        if order.get("group"):
            os.setpgid(0, 0)
        if "shard_bytes" in order:
            sys.modules["moezoo_train.data.prepare"].SHARD_BYTES = order["shard_bytes"]
        sys.addaudithook(watch)
        code = start(order, main)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, f"\0{watch.count}".encode())
    with suppress(OSError):
        modules(log).write_text("\n".join(name for name in sys.modules if name not in known))
    os._exit(code)


def start(order: dict[str, Any], main: Any) -> int:
    """Run what the order names, and return its exit status."""
    arguments = order["arguments"]
    if "program" in order:
        sys.argv = [order["program"], *arguments]
        sys.path.insert(0, str(Path(order["program"]).parent))
        runpy.run_path(order["program"], run_name="__main__")
        return 0
    if "code" in order:
        sys.argv = ["-c", *arguments]
        exec(compile(order["code"], "<code>", "exec"), {"__name__": "__main__"})
        return 0
    if arguments == ["save"]:
        save(Path(order["folder"]))
    return int(main(arguments))


class Watch:
    """Counts the changes of the file system under a folder, and dies at one of them."""

    def __init__(self, folder: str, operation: int | None, delay: float) -> None:
        self.folder, self.operation, self.delay = folder, operation, delay
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            mine = isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        else:
            mine = event in CHANGES
        # Names within a folder that is being removed come without it.
        inside = str(arguments[0]).startswith(self.folder) if mine else False
        if not (inside or (event in {"os.remove", "os.rmdir"} and arguments[-1] not in (-1, None))):
            return
        self.count += 1
        if self.count == self.operation:
            if self.delay:
                threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def drop_privileges() -> None:
    """Give up root's right to write where permissions forbid it (capset, CAP_DAC_OVERRIDE)."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    version_3, this_process, override, read_search = 0x20080522, 0, 1 << 1, 1 << 2
    header = (ctypes.c_uint32 * 2)(version_3, this_process)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for index in range(3):
        data[index] &= ~(override | read_search)
    assert libc.capset(header, data) == 0


def limit_memory(added: int) -> None:
    """Let this process take so many bytes more; only Linux tells how many it has."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        present = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + added,) * 2)


def save(folder: Path) -> NoReturn:
    """Write checkpoints of both kinds without end; all numbers of the n-th are n."""
    import torch

    from moezoo_models import MoezooConfig, MoezooForCausalLM
    from moezoo_models.checkpoints.directory import save_checkpoint
    from moezoo_train.checkpoint.files import AtomicCheckpointIO

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = MoezooForCausalLM(MoezooConfig(**sizes))
    number = 0
    while True:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        save_checkpoint(folder / "model", model, max_shard_size="20KB")
        state = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}
        AtomicCheckpointIO().save_checkpoint(state, folder / "last.ckpt")
        print(number)
        number += 1


if __name__ == "__main__":
    serve()
