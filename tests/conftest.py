"""What every test shares: seeds, threads, poisoned memory, and no GPU tests without a GPU."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moezoo import dtype_speed
from moezoo_kernels import product_libraries

# Modules stay: to go through them again and again would be a third of what collecting takes.
gc.disable()

# Without it cuBLAS refuses to run under torch.use_deterministic_algorithms (`poison_empty`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Commands that tests start measure the machine's dtypes once for all of them, not for its user.
os.environ["MOEZOO_CACHE"] = os.path.join(tempfile.gettempdir(), "moezoo-tests")
SPEEDS = dtype_speed.speeds

# Where programs are that fork; not in this folder, whose others are called as packages are.
FORKING = str(Path(__file__).parent / "reliability")

RANKS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
)

# Tiny tensors on many threads spend their time waiting for each other.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: whichever is begun last, all other workers wait for its end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all that was imported, and runs from probes.

    A run begins by measuring the processor for a tenth of a second, more than most of the runs of
    tests compute; here by the smallest products only.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if throughput := sys.modules.get("moezoo_train.measure.throughput"):
        throughput.PROBE_SECONDS = 0.0


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forget_ranks() -> Iterator[None]:
    """Take away what a strategy told its ranks, or a later test's processes would be ranks, too."""
    yield
    for name in RANKS:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Return a process that forks others, which then need not import what it has."""
    sys.path.insert(0, FORKING)
    from forked import Server

    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_each(tmp_path_factory) -> Callable[..., list[str]]:
    """Return a function that runs texts in processes that have run nothing but a first one."""
    sys.path.insert(0, FORKING)
    from each import run_each

    return lambda first, codes: run_each(tmp_path_factory.mktemp("each"), first, codes)


@pytest.fixture
def real_dtype_speed():
    """Return what measures the dtypes of this machine, which no other test does."""
    return SPEEDS


@pytest.fixture(autouse=True)
def same_dtype_speed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide in tests as on a CPU where bf16 is slower, whatever this machine is."""
    products = {torch.float32: 100.0, torch.bfloat16: 80.0, torch.float16: 80.0}
    figures = dtype_speed.Speeds(products)
    monkeypatch.setattr(dtype_speed, "speeds", lambda: figures)


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """Fill uninitialised memory with NaN and huge integers, and forbid nondeterministic ops.

    Torch does both itself, inside its own C++ too, so a result that reads a row nobody wrote turns
    into NaN instead of passing because the memory happened to hold zeros.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled)


@pytest.fixture(params=["avx512", "avx2", "generic"])
def native_library(request, monkeypatch):
    """Run a test once with each C++ library that this machine can load; gives its name."""
    from moezoo_kernels import native

    monkeypatch.setenv("MOEZOO_NATIVE", request.param)
    native.load.cache_clear()
    library = native.load()
    if isinstance(library, str):
        native.load.cache_clear()
        pytest.skip(library)
    yield request.param
    native.load.cache_clear()


@pytest.fixture
def install_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a stand-in for a module, and its parents, where imports look."""

    def install(path: str, **members: object) -> None:
        names = path.split(".")
        for end in range(1, len(names) + 1):
            name = ".".join(names[:end])
            module = sys.modules.get(name) or types.ModuleType(name)
            module.__spec__ = types.SimpleNamespace(name=name, origin=None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
            if end > 1:
                parent = sys.modules[".".join(names[: end - 1])]
                monkeypatch.setattr(parent, names[end - 1], module, raising=False)
        for name, member in members.items():
            setattr(sys.modules[path], name, member)

    return install


@pytest.fixture
def onednn(monkeypatch):
    """Send every product that suits to oneDNN; return the shapes of those that it was sent."""
    if not product_libraries.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    shapes, run = [], product_libraries.onednn_linear

    def counted(x, weight, bias=None):
        shapes.append((*x.shape, weight.shape[0]))
        return run(x, weight, bias)

    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(product_libraries, "onednn_linear", counted)
    return shapes
