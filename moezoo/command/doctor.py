"""`moezoo doctor`: what this machine has, and which backends are usable or why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

import moezoo
from moezoo import dtype_speed
from moezoo.command.tables import print_table
from moezoo_kernels import product_libraries
from moezoo_kernels.machine_figures import cpu_name

PACKAGES = (
    "numpy",
    "safetensors",
    "lightning",
    "jsonargparse",
    "transformers",
    "sentencepiece",
    "tensorboard",
    "datasets",
    "pyarrow",
    "wandb",
    "peft",
)
OPTIONAL = {
    "triton": "pip install 'moezoo[gpu]'",
    "xformers": "pip install 'moezoo[xformers]'",
    "deepspeed": "pip install 'moezoo[deepspeed]'",
    "gguf": "pip install 'moezoo[gguf]'",
    "megablocks": "see 'megablocks' in docs/quickstart.md: built from source, --no-deps",
    "scattermoe": "build it from its source with --no-deps",
}


def doctor() -> None:
    """Show versions, devices, and which backends are usable or why not."""
    print_table("versions", ["package", "version"], _versions())
    print_table("devices", ["device", "what"], _devices())
    print_table("dtypes on the CPU", ["what", ">fp32", ">bf16", ">fp16", "chosen"], _dtypes())
    print_table("products in fp32 on the CPU", ["library", ">GFLOP/s", "gets"], _libraries())
    print_table("backends", ["op", "backend", "device", "usable", "why not"], _backends())
    print_table("optional packages", ["package", "version", "usable", "why not"], _optional())


def _versions() -> list[list[str]]:
    own = [
        ["moezoo", moezoo.__version__],
        ["python", platform.python_version()],
        ["torch", torch.__version__],
    ]
    return own + [[name, _version(name) or "not installed"] for name in PACKAGES]


def _devices() -> list[list[str]]:
    cpu = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    rows = [["cpu", f"{cpu}, {torch.backends.cpu.get_cpu_capability()}"]]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        rows.append([f"cuda:{index}", f"{device.name}, {memory:.0f} GiB"])
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no usable GPU or driver" if built else "this torch is built without CUDA"
        rows.append(["cuda", f"not available: {reason}"])
    if torch.backends.mps.is_available():
        rows.append(["mps", "Apple GPU"])
    return rows


def _dtypes() -> list[list[str]]:
    """Show what was measured, and what ``auto`` makes of it."""
    figures = dtype_speed.speeds()
    products = [f"{figures.products[dtype]:.3g}" for dtype in dtype_speed.DTYPES]
    fast = [
        name
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
        if not dtype_speed.is_slow(dtype)
    ]
    as_saved = f"{' and '.join(fast)} checkpoints as saved" if fast else "all checkpoints in fp32"
    chosen = [
        f"precision {dtype_speed.training_precision('cpu')}",
        f"muon_dtype {dtype_speed.muon_dtype('cpu')}",
        as_saved,
    ]
    return [["products, GFLOP/s", *products, "; ".join(chosen)]]


def _libraries() -> list[list[str]]:
    """Show how fast each library multiplies in fp32 on the CPU, and what it gets."""
    rates = product_libraries.rates()
    maps = product_libraries.chosen()
    experts = "own" if product_libraries.own_keeps_up() else "torch"
    factors = "own" if product_libraries.own_is_faster() else "torch"
    rows = []
    for name, shown in (("torch", "torch"), ("onednn", "oneDNN"), ("own", "moezoo")):
        rate = getattr(rates, name)
        gets = [
            what
            for what, by in (("linear maps", maps), ("experts", experts), ("factors", factors))
            if by == name
        ]
        rows.append([shown, f"{rate:.3g}" if rate else "not there", ", ".join(gets) or "nothing"])
    return rows


def _backends() -> list[list[str]]:
    from moezoo_kernels.backends import table

    return [
        [row.op, row.backend, row.device, _usable(row.usable, row.default), row.reason]
        for row in table()
    ]


def _usable(usable: bool, default: bool) -> str:
    return "yes, default" if default else "yes" if usable else "no"


def _optional() -> list[list[str]]:
    rows = []
    for name, remedy in OPTIONAL.items():
        version = _version(name)
        if version is None:
            rows.append([name, "-", "no", f"not installed; {remedy}"])
            continue
        reason = _why_unusable(name)
        rows.append([name, version, "no" if reason else "yes", reason])
    return rows


def _why_unusable(name: str) -> str:
    """Import a package and give the reason it fails, or an empty text."""
    try:
        importlib.import_module(name)
    except Exception as error:
        # A broken extension raises whatever its authors chose; the report is what is wanted.
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(name)
        return getattr(module, "__version__", None)
