"""Hundreds of spoilt inputs: each is refused in one line, or read as it should be.

A mutation is run by one of the commands that read it, in a process of its own with little time and
memory. Those that are accepted are named, with the reason why, in ``harmless.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path

import artefacts
import pytest
import torch
import yaml
from artefacts import Artefact
from harmless import reason
from mutations import of_bytes, of_yaml

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("MOEZOO_MUTATIONS", "3"))
"""Mutations of each artefact."""
SECONDS = 30
"""What a core may take for one, which does not depend on what else it does …"""
LIMIT = 240.0
"""… and what may pass while it waits."""
MEMORY = 3 << 30
LONGEST_LINE = 1500
NAMES = "own llama mixtral ckpt sharded data recipe comparison options jsonl parquet txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="module")
def text(folder, corpus) -> Path:
    """Return a text file to measure with."""
    file = folder / "text.txt"
    file.write_text("\n".join((corpus / f"{n}.txt").read_text() for n in range(4)))
    return file


@pytest.fixture(scope="module")
def own(whole, fit, text):
    model = whole[0] / "model"
    commands = artefacts.model_commands(fit, text, kind="own")
    return Artefact(model, artefacts.model_mutations(model), commands)


@pytest.fixture(scope="module")
def llama(data, fit, text, folder):
    model = artefacts.stock(folder / "llama", "Llama", data / "tokenizer", 300)
    commands = artefacts.model_commands(fit, text, kind="Llama")
    return Artefact(model, artefacts.model_mutations(model), commands)


@pytest.fixture(scope="module")
def mixtral(data, fit, text, folder):
    model = artefacts.stock(folder / "mixtral", "Mixtral", data / "tokenizer", 300)
    commands = artefacts.model_commands(fit, text, kind="Mixtral")
    return Artefact(model, artefacts.model_mutations(model), commands)


@pytest.fixture(scope="module")
def ckpt(whole, fit):
    file = whole[0] / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    name = "checkpoints/last.ckpt"
    mutations = artefacts.checkpoint_mutations(name, state, file.stat().st_size)
    return Artefact(whole[0], mutations, artefacts.checkpoint_commands(fit))


@pytest.fixture(scope="module")
def sharded(server, fit, folder):
    options = {
        "trainer.devices": 2,
        "trainer.strategy": "moezoo_train.parallel.fsdp2.FSDP2Strategy",
        "trainer.strategy.save_distributed_checkpoint": "true",
        "model.optimizer.name": "adamw",
    }
    run = folder / "sharded"
    ended = server.run_ranks(2, *fit(run, **options), folder=folder)
    assert [process.code for process in ended] == [0, 0], ended
    name = "checkpoints/last.ckpt/rest.ckpt"
    state = torch.load(run / name, weights_only=True)
    mutations = artefacts.checkpoint_mutations(name, state, (run / name).stat().st_size)
    for part in sorted((run / "checkpoints" / "last.ckpt").glob("*.safetensors")):
        size = part.stat().st_size
        mutations += of_bytes(f"checkpoints/last.ckpt/{part.name}", size)

    def fit_adamw(output, **given):
        return fit(output, **{"model.optimizer.name": "adamw", **given})

    return Artefact(run, mutations, artefacts.checkpoint_commands(fit_adamw))


@pytest.fixture(scope="module")
def prepared(data, fit, corpus):
    return Artefact(data, artefacts.data_mutations(data), artefacts.data_commands(fit, corpus))


def settings(folder: Path, document, commands) -> Artefact:
    """Write a YAML file, and spoil it."""
    folder.mkdir()
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    size = file.stat().st_size
    mutations = [
        *of_yaml("settings.yaml", document),
        *of_bytes("settings.yaml", size, text=True),
    ]
    return Artefact(folder, mutations, commands)


@pytest.fixture(scope="module")
def recipe(fit, folder):
    document = artefacts.recipe(fit("run", **artefacts.ONE_STEP))
    return settings(
        folder / "recipe",
        document,
        lambda item, work: {
            "fit": ["fit", f"--config={item / 'settings.yaml'}"],
        },
    )


@pytest.fixture(scope="module")
def comparison(folder, corpus):
    document = {**artefacts.COMPARISON}
    document["text"] = {**document["text"], "source": str(corpus), "data_dir": "data"}
    return settings(
        folder / "comparison",
        document,
        lambda item, work: {"compare": ["compare", f"--config={item / 'settings.yaml'}"]},
    )


@pytest.fixture(scope="module")
def options(folder, corpus):
    document = {
        "source": str(corpus),
        "output": "data",
        "vocab_size": 300,
        "val_fraction": 0.1,
        "seed": 0,
        "max_bytes": 4000,
        "text_field": "text",
        "tokenizer": None,
    }
    return settings(
        folder / "options",
        document,
        lambda item, work: {"prepare": ["prepare", f"--config={item / 'settings.yaml'}"]},
    )


def source(folder: Path, name: str, mutations) -> Artefact:
    return Artefact(
        folder,
        mutations,
        lambda item, work: {
            "prepare": [
                *("prepare", f"--source={item / name}", "--vocab_size=300"),
                *("--output=data", "--val_fraction=0.3"),
            ]
        },
    )


ROWS = [{"text": f"the cat {n} sat on the mat", "id": n} for n in range(6)]


@pytest.fixture(scope="module")
def jsonl(folder):
    import json

    (folder / "jsonl").mkdir()
    text = "\n".join(map(json.dumps, ROWS)) + "\n"
    (folder / "jsonl" / "rows.jsonl").write_text(text)
    return source(folder / "jsonl", "rows.jsonl", artefacts.jsonl_mutations("rows.jsonl", ROWS))


@pytest.fixture(scope="module")
def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "parquet").mkdir()
    file = folder / "parquet" / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, write_page_checksum=True)
    mutations = artefacts.parquet_mutations("rows.parquet", file.stat().st_size)
    return source(folder / "parquet", "rows.parquet", mutations)


@pytest.fixture(scope="module")
def txt(folder, corpus):
    (folder / "txt").mkdir()
    file = folder / "txt" / "rows.txt"
    text = (corpus / "1.txt").read_text() * 3
    text = "".join(f"{row['text']} {text}\n\n" for row in ROWS)
    file.write_text(text)
    mutations = list(of_bytes("rows.txt", len(text), text=True))
    return source(folder / "txt", "rows.txt", mutations)


@pytest.mark.parametrize("name", NAMES.split())
def test_mutations(name, request, server, tmp_path, record_property):
    artefact = request.getfixturevalue({"data": "prepared"}.get(name, name))
    # In an order that stays what it is when another field is there.
    chosen = sorted(artefact.mutations, key=lambda mutation: drawn(name, mutation))
    counts: Counter[str] = Counter()
    wrong = []
    sound = shutil.copytree(artefact.folder, tmp_path / "sound" / "item")
    for command, arguments in artefact.commands(sound, sound.parent).items():
        ended = server.run(*arguments, folder=sound.parent)
        assert ended.code == 0, (command, ended.output)
    for mutation in chosen[:COUNT]:
        number = drawn(name, mutation)
        work = tmp_path / str(number)
        item = shutil.copytree(artefact.folder, work / "item")
        mutation.apply(item)
        commands = artefact.commands(item, work)
        command = sorted(commands)[number % len(commands)]
        before = snapshot(work)
        extra = {"unprivileged": True} if mutation.unprivileged else {}
        ended = server.run(
            *commands[command], folder=work, limit=LIMIT, processor=SECONDS, memory=MEMORY, **extra
        )
        outcome, detail = judge(ended)
        if outcome == "clean" and (changed := snapshot(work) ^ before):
            outcome, detail = "half-written", str(sorted(path for path, _ in changed)[:4])
        if outcome == "accepted":
            why = reason(f"{name} {command} {mutation.name}")
            outcome = "harmless" if why else outcome
        counts[outcome] += 1
        if outcome not in ("clean", "harmless"):
            wrong.append(f"{name}: {mutation.name}: {command}: {outcome}: {detail}")
            if log := os.environ.get("MOEZOO_FINDINGS"):  # at once: a long run may be ended
                with open(log, "a") as file:
                    file.write(f"{wrong[-1]}\n")
        shutil.rmtree(work)
    record_property("mutations", (name, dict(counts)))
    assert not wrong, "\n".join([f"{len(wrong)} of {counts.total()}", *wrong])


def drawn(name: str, mutation) -> int:
    """Return a number that the names alone decide."""
    return zlib.crc32(f"{name} {mutation.name}".encode())


def snapshot(work: Path) -> set[tuple[str, bytes]]:
    """Return names and contents of the files below a folder; locks stay for who waits for them."""
    return {
        (str(path.relative_to(work)), path.read_bytes())
        for path in work.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def judge(ended) -> tuple[str, str]:
    """Return how a command took what it was given."""
    lines = ended.output.splitlines() or [""]
    last = lines[-1][:300]
    if ended.code in (-9, -24) or re.search(r"MemoryError|allocate memory|bad_alloc", ended.output):
        return "hang", f"{ended.seconds:.1f} s {last}"
    if ended.code == 0:
        return "accepted", last
    errors = [line for line in lines if line.startswith("moezoo: error: ")]
    traced = re.search(r"Traceback|panicked at", ended.output)
    if ended.code != 2 or traced or len(errors) != 1 or lines[-1] != errors[0]:
        places = re.findall(r'File "[^"]*/(moezoo\w*/[^"]+)", line (\d+)', ended.output)
        return "traceback", f"code {ended.code} {last} at {':'.join(places[-1]) if places else ''}"
    if len(errors[0]) > LONGEST_LINE or not errors[0].isprintable():
        return "unreadable", f"{len(errors[0])} characters: {errors[0][:100]!r}"
    return "clean", errors[0]
