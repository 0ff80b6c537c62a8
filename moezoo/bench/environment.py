"""The environment of a measurement, to be stored beside every number."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import moezoo
from moezoo_kernels import native
from moezoo_kernels.machine_figures import cpu_name

_PACKAGES = (
    "transformers",
    "PEER-pytorch",
    "product-key-memory",
    "fastfeedforward",
    "triton",
    "scattermoe",
    "megablocks",
    "torchtitan",
    "tokenizers",
    "sentencepiece",
    "mergekit",
    "xllamacpp",
)
_VARIABLES = (
    "THP_MEM_ALLOC_ENABLE",  # huge pages for torch's tensors: fresh memory is much cheaper
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MOEZOO_BACKEND",
    "MOEZOO_NATIVE",
    "MOEZOO_PRODUCTS",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe machine, versions and settings, in words and numbers that JSON can hold."""
    cuda = device.type == "cuda"
    library = native.load()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native kernels": library if isinstance(library, str) else library.name,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moezoo": moezoo.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "variables": {name: os.environ.get(name, "unset") for name in _VARIABLES},
    }


def _version(distribution: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that moezoo runs from, ``-dirty`` if files have changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
