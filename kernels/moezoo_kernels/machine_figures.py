"""What was measured of this machine once, kept for later processes of the same user.

One JSON file per subject in ``$MOEZOO_CACHE`` (default: ``~/.cache/moezoo``), of figures by what
they hold for. Without a folder to write to, each process measures anew.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


def key(threads: int, *more: str) -> str:
    """Return what figures hold for: processor, torch, threads, and what chooses instructions.

    Args:
        threads: of a product.
        more: what else they depend on.
    """
    parts = [
        cpu_name(),
        f"torch {torch.__version__}",
        f"{threads} threads",
        torch.backends.cpu.get_cpu_capability(),
        *([] if torch.backends.mkldnn.enabled else ["mkldnn off"]),
        *(f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)),
        *more,
    ]
    return ", ".join(parts)


def kept(subject: str, key: str) -> Any:
    """Return the figures of a subject under a key; None if there are none that can be read."""
    return _read(_path(subject)).get(key)


def keep(subject: str, key: str, figures: Any) -> None:
    """Keep a subject's figures, which JSON can hold, beside those under other keys."""
    path = _path(subject)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            json.dump(_read(path) | {key: figures}, file, indent=2)
        os.replace(temporary, path)
    except OSError:  # measured again by the next process
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def cpu_name() -> str:
    """Name the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _path(subject: str) -> Path:
    # The folder of moezoo.cache_folder, which is read before torch is imported.
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("MOEZOO_CACHE") or os.path.join(caches, "moezoo")
    return Path(folder, f"{subject}.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
