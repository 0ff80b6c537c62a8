"""One writer for all conversions: killed runs go on where they were, and others stay untouched."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from moezoo import InputError
from moezoo_models.conversion import writer
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.checkpoint import NewCheckpoint
from moezoo_models.conversion.drop import drop_layers
from moezoo_models.conversion.fuse import fuse_layers
from moezoo_models.conversion.snnk import snnk
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.sparsify import sparsify
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.upcycle import upcycle

COMMANDS = {
    "carve": lambda *where, **text: carve(*where, 2, 4, 8, sparsified=False, **text),
    "sparsify": lambda *where, **text: sparsify(*where, "teal", **text),
    "snnk": lambda *where, **text: snnk(*where, layers=[1], **text),
    "upcycle": lambda *where, max_shard_size, **_: upcycle(
        *where, experts=2, top_k=2, max_shard_size=max_shard_size
    ),
    "drop-layers": lambda *where, **text: drop_layers(*where, 1, first=1, **text),
    "fuse-layers": lambda *where, **text: fuse_layers(*where, 0, 2, **text),
}


def contents(directory):
    """Return the bytes of all files, but for times."""
    return {
        str(file.relative_to(directory)): re.sub(rb'"seconds\w*": [^\n]*', b"", file.read_bytes())
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def killed(monkeypatch):
    """Kill what is written within this, at a given file of weights."""
    whole, count = writer.Workspace.write, []

    def write(self, shard, progress):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(shard)
        whole(self, shard, progress)

    def kill(call):
        with monkeypatch.context() as patch:
            patch.setattr(writer.Workspace, "write", write)
            with pytest.raises(KeyboardInterrupt):
                call()
        count.clear()

    return kill


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_goes_on_and_leaves_the_same(
    command, readable, text, tmp_path, killed, monkeypatch
):
    source, out = readable(), tmp_path / "out"
    (source / "README.md").write_text("# A model\n", encoding="utf-8")
    text |= {"calibration_tokens": 192, "held_out_tokens": 64, "max_shard_size": "0.03MB"}
    run = COMMANDS[command]
    run(source, tmp_path / "whole", **text)
    killed(lambda: run(source, out, **text))
    assert not out.exists()
    complete = sorted((tmp_path / ".out.partial").glob("model-*.safetensors"))
    assert len(complete) == 2
    first = {file.name: file.stat().st_ino for file in complete}
    run(source, out, **text)
    assert {name: (out / name).stat().st_ino for name in first} == first
    assert contents(out) == contents(tmp_path / "whole")
    assert f"`moezoo {command}`" in (out / "README.md").read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".out.p")] == []

    before = contents(out)
    other = COMMANDS["upcycle" if command != "upcycle" else "drop-layers"]
    with pytest.raises(InputError, match=r"target: .*out is not empty; name a new directory"):
        other(source, out, **text)
    assert contents(out) == before


def checkpoint(source, target, command="snnk", pieces=None, **options):
    """Return a checkpoint of three files, to be made."""
    tensors = [torch.full((100, 10), float(n)) for n in range(3)]
    outputs = [
        Output(f"tensor.{n}", (100, 10), torch.float32, lambda each=each: iter([each]))
        for n, each in enumerate(tensors)
    ]
    options = {"max_shard_size": "0.004MB", "force": False} | options
    return NewCheckpoint(command, [source], target, outputs, **options)


def written(new, decides, **options):
    with new.opened(decides, **options):
        new.write({"model_type": "x"}, "Nothing.")


def test_only_the_same_is_gone_on_with(readable, tmp_path, killed):
    out = tmp_path / "out"
    partial = tmp_path / ".out.partial"
    with open_source(readable()) as source:

        def identity(decides=("a",), **options):
            new = checkpoint(source, out, **options)
            killed(lambda: written(new, decides))
            return json.loads((partial / "manifest.json").read_text())["identity"]

        first = identity()
        kept = (partial / "model-00001-of-00003.safetensors").stat().st_ino
        assert identity() == first
        assert (partial / "model-00001-of-00003.safetensors").stat().st_ino == kept
        others = [
            identity(("b",)),
            identity(command="sparsify"),
            identity(max_shard_size="0.005MB"),
        ]
        assert len({first, *others}) == 4
        source.raw["rope_theta"] = 7.0
        assert identity() not in {first, *others}


def test_room_that_a_killed_run_takes_is_its_own(readable, tmp_path, killed, monkeypatch):
    """A disk that holds the checkpoint once is enough, however far a run came that was killed."""
    with open_source(readable()) as source:
        new = checkpoint(source, tmp_path / "out")
        assert new.bytes == 3 * 4000
        assert new.parameters == 3000
        killed(lambda: written(new, []))
        free = {"free": 5000}
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(**free))
        with pytest.raises(InputError, match=r"target: .* needs .* make room"):
            written(new, [], scratch_bytes=2000)
        assert len(list((tmp_path / ".out.partial").glob("model-*"))) == 2
        written(new, [])
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3


def test_what_fails_leaves_what_was_there(readable, tmp_path):
    out = tmp_path / "out"
    with open_source(readable()) as source:
        written(checkpoint(source, out), [])
        before = contents(out)
        bad = Output("tensor", (3,), torch.float32, lambda: iter([torch.tensor([1, 2, torch.nan])]))
        new = NewCheckpoint("snnk", [source], out, [bad], "5GB", force=True)
        with pytest.raises(InputError, match="'tensor' holds NaN"):
            written(new, [])
        assert contents(out) == before
        assert not (tmp_path / ".out.partial").exists()
        with pytest.raises(InputError, match="max_shard_size: 'many' is no size"):
            checkpoint(source, tmp_path / "new", max_shard_size="many")
