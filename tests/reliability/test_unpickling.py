"""Unpickling runs any code: no source of ours does it, except between processes of one run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("moezoo", "kernels/moezoo_kernels", "models/moezoo_models", "train/moezoo_train")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HARMLESS = {"PickleError", "UnpicklingError", "PicklingError"}
"""What `pickle` may be imported for."""
NAMES = {"FileSystemReader", "read_pickle", "Unpickler", "load_from_checkpoint"}
"""What unpickles, whoever offers it: torch's usual index of distributed checkpoints, and others."""
SAFE = {"weights_only": True, "allow_pickle": False, "trust_remote_code": False}


def unpickling(source: str) -> Iterator[str]:
    """Yield each place that unpickles, or could."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            aliases = {alias.name for alias in node.names if alias.asname}
            if names & MODULES or "pickle" in aliases or "torch" in aliases:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names}
            module = (node.module or "").partition(".")[0]
            if module in MODULES or imported & NAMES:
                yield ast.unparse(node)
            if module == "pickle" and not imported <= HARMLESS:
                yield ast.unparse(node)
            if node.module in ("torch", "torch.serialization", "torch.hub") and "load" in imported:
                yield ast.unparse(node)
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner == "pickle" and node.attr not in HARMLESS) or node.attr in NAMES:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            function = ast.unparse(node.func)
            if function in ("torch.load", "torch.hub.load") and "weights_only" not in given:
                yield ast.unparse(node)
            if any(given.get(name, str(safe)) != str(safe) for name, safe in SAFE.items()):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "line",
    [
        "import dill",
        "import pickle as p",
        "from pickle import loads",
        "from joblib import load",
        "pickle.load(file)",
        "pickle.Unpickler(file).load()",
        "torch.load(file)",
        "torch.load(open(name(), 'rb'), map_location='cpu')",
        "torch.load(file, weights_only=False)",
        "super().load_checkpoint(path, weights_only=weights_only)",
        "from torch import load",
        "import torch as t",
        "numpy.load(file, allow_pickle=True)",
        "dcp.FileSystemReader(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_unpickles(line):
    assert list(unpickling(line))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import UnpicklingError",
        "pickle.UnpicklingError",
        "torch.load(file, map_location=device(), weights_only=True)",
        "numpy.load(file)",
    ],
)
def test_the_search_passes_what_does_not(line):
    assert not list(unpickling(line))


def test_no_source_unpickles():
    assert len(SOURCES) > 100
    found = {str(path): list(unpickling(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: places for path, places in found.items() if places} == {}


def test_objects_travel_only_between_the_processes_of_one_run():
    """Torch pickles them; what a run's own processes send is as safe as the run."""
    sends = re.compile(r"gather_object|object_list")
    senders = {path.name for path in SOURCES if sends.search(path.read_text(encoding="utf-8"))}
    assert senders == {"distributed.py", "sharded_checkpoints.py"}
