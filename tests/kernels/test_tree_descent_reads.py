"""What the C++ kernels of trees read: rows on the path and no other, for those may be unmapped."""

import subprocess
import sys

import pytest

from moezoo_kernels import native

ONLY_THE_PATH = """
import ctypes, mmap, os, torch
from moezoo_kernels import native, path_neurons, tree_descent, use

WIDTH = mmap.PAGESIZE // 4  # a row is a page
libc = ctypes.CDLL(None, use_errno=True)

def rows(count):
    memory = mmap.mmap(-1, count * mmap.PAGESIZE)
    return torch.frombuffer(memory, dtype=torch.float32).view(count, WIDTH).normal_()

def hide(table, but):
    for row in set(range(len(table))) - set(but):
        page = ctypes.c_void_p(table[row].data_ptr())
        assert libc.mprotect(page, mmap.PAGESIZE, 0) == 0

use("cpu")
ran = []
for library in ("avx512", "avx2", "generic"):
    os.environ["MOEZOO_NATIVE"] = library
    native.load.cache_clear()
    if isinstance(native.load(), str):
        continue
    torch.manual_seed(0)
    x, bias = torch.randn(1, WIDTH), torch.zeros(31)
    weight = rows(31)
    node, asked = 0, []
    while node < 31:
        asked.append(node)
        node = 2 * node + (2 if weight[node] @ x[0] >= 0 else 1)
    assert len(asked) == 5
    hide(weight, asked)
    assert tree_descent(x, weight, bias).tolist() == [node - 31]

    into, out = rows(2 * 31), rows(2 * 31)
    asked = []
    for root in (0, 31):
        node = 0
        while node < 31:
            asked.append(root + node)
            node = 2 * node + (2 if into[root + node] @ x[0] > 0 else 1)
    assert len(asked) == 2 * 5
    expected = torch.relu(into[asked] @ x[0]) @ out[asked]
    hide(into, asked)
    hide(out, asked)
    trees = (into.view(2, 31, WIDTH), torch.zeros(2, 31), out.view(2, 31, WIDTH))
    output, _ = path_neurons(x, *trees, activation="relu")
    assert (output[0] - expected).norm() < 1e-5 * expected.norm()
    ran.append(library)
print(*ran)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_only_rows_on_the_path_are_read(monkeypatch):
    library = native.load()
    if isinstance(library, str):
        pytest.skip(library)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    command = [sys.executable, "-c", ONLY_THE_PATH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert library.name in done.stdout.split(), done.stderr
