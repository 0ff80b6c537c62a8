"""What is spoilt: one small thing of each kind that is read, and the commands that read it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from mutations import Mutation, of_bytes, of_json, of_objects

Command = list[str]


@dataclass(frozen=True)
class Artefact:
    """One thing that is spoilt.

    Attributes:
        folder: what is copied for each mutation.
        mutations: all ways to spoil it.
        commands: makes the commands that read a copy; they write into the folder given second.
    """

    folder: Path
    mutations: list[Mutation]
    commands: Callable[[Path, Path], dict[str, Command]]


ONE_STEP = {"trainer.max_steps": 1, "model.schedule.warmup_steps": 0}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def stock(folder: Path, kind: str, tokenizer: Path, vocabulary: int) -> Path:
    """Write a small model of transformers in two files, as ``kind`` Llama or Mixtral."""
    import transformers

    extra = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, **extra, vocab_size=vocabulary, bos_token_id=None, eos_token_id=0
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    shutil.copytree(tokenizer, folder)
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def model_mutations(folder: Path) -> list[Mutation]:
    """Spoil a model's directory."""
    found: list[Iterator[Mutation]] = []
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        found.append(of_bytes(file.name, size, text=file.suffix == ".json"))
        if file.suffix == ".json":
            document = json.loads(file.read_text())
            limits = {"depth": 2, "width": 12} if file.name == "tokenizer.json" else {}
            found.append(of_json(file.name, document, **limits))
        elif file.suffix == ".safetensors":
            data = file.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
            found.append(of_json(file.name, header, _header_writer(rest), depth=3, width=4))
    return list(chain(*found))


def _header_writer(rest: bytes) -> Callable[[Path, str], Any]:
    def write(file: Path, header: str) -> None:
        text = header.encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return write


def model_commands(fit: Any, text: Path, kind: str) -> Callable[[Path, Path], dict[str, Command]]:
    """Read a model's directory."""

    def commands(item: Path, work: Path) -> dict[str, Command]:
        start = {"model.initialize_from": item, **ONE_STEP}
        found = {
            "generate": ["generate", f"--checkpoint={item}", "--prompt=the", "--max_new_tokens=2"],
            "evaluate": ["evaluate", f"--checkpoint={item}", f"--text={text}"],
            "fit": from_model(fit(work / "run", **start)),
            "usage": ["inspect", "usage", f"--checkpoint={item}", f"--text={text}"],
        }
        if kind != "own":
            del found["usage"]
        if kind == "Llama":
            found["upcycle"] = ["upcycle", str(item), str(work / "mixture"), "--experts=2"]
            found["carve"] = [
                *("carve", str(item), str(work / "out"), "--shared=1", "--active=2", "--experts=4"),
                *(f"--calibration={text}", "--calibration_tokens=64", "--held_out_tokens=32"),
                *("--window=16", "--no-sparsified"),
            ]
        return found

    return commands


def from_model(arguments: Command) -> Command:
    """Leave out what a model that is read has already."""
    return [
        word
        for word in arguments
        if not word.startswith(("--model.ffn", "--model.num", "--model.d_", "--model.optim"))
    ]


def checkpoint_mutations(file: str, state: Any, size: int) -> list[Mutation]:
    """Spoil a training checkpoint, or the rest of a divided one."""
    found = of_objects(file, state, torch.save, depth=5, width=40)
    return list(chain(of_bytes(file, size), found))


def checkpoint_commands(fit: Any) -> Callable[[Path, Path], dict[str, Command]]:
    """Read a checkpoint of a run."""

    def commands(item: Path, work: Path) -> dict[str, Command]:
        longer = {"trainer.max_steps": 10, "model.schedule.total_steps": 9}
        last = item / "checkpoints" / "last.ckpt"
        return {
            "fit": [*fit(item, **longer), "--ckpt_path=last"],
            "validate": ["validate", *fit(item)[1:]],
            "export": ["export", str(last), str(work / "out")],
        }

    return commands


def data_mutations(folder: Path) -> list[Mutation]:
    """Spoil prepared data."""
    found = [of_json("meta.json", json.loads((folder / "meta.json").read_text()))]
    for name in ("meta.json", "train.bin", "val.bin", "tokenizer/tokenizer.json"):
        size = (folder / name).stat().st_size
        found.append(of_bytes(name, size, text=name.endswith(".json")))
    return list(chain(*found))


def data_commands(fit: Any, corpus: Path) -> Callable[[Path, Path], dict[str, Command]]:
    """Read prepared data."""

    def commands(item: Path, work: Path) -> dict[str, Command]:
        few = {"data.data_dir": item, **ONE_STEP}
        prepare = ["prepare", f"--source={corpus}", f"--output={item}", "--vocab_size=300"]
        return {
            "fit": fit(work / "run", **few),
            "prepare": [*prepare, "--val_fraction=0.1"],
        }

    return commands


def recipe(arguments: Command) -> dict[str, Any]:
    """Write the options of a run as its YAML file does."""
    tree: dict[str, Any] = {}
    for word in arguments[1:]:
        name, _, value = word.removeprefix("--").partition("=")
        *path, last = name.split(".")
        owner = tree
        for part in path:
            owner = owner.setdefault(part, {})
        if last == "ffn":
            owner[last] = {"class_path": value}
        else:
            owner[last] = yaml.safe_load(value)
    ffn = tree["model"]["ffn"]
    tree["model"]["ffn"] = {
        "class_path": ffn.pop("class_path", "moezoo.SparseMoE"),
        "init_args": ffn,
    }
    return tree


COMPARISON = {
    "output": "comparison",
    "baseline": "dense_mlp",
    "seeds": [0],
    "max_steps": 1,
    "ablation": False,
    "layers": "all",
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
    "text": {"vocab_size": 300, "sequence_length": 16, "batch_size": 2, "val_fraction": 0.1},
    "schedule": {"warmup_steps": 0},
    "optimizer": {"lr": 0.001},
    "methods": {"dense_mlp": {}, "mixtral": {"layers": "all", "optimizer": {"lr": 0.002}}},
    "claims": {"one": {"says": "s", "paper": "p", "order": ["mixtral", "dense_mlp"]}},
}


def jsonl_mutations(name: str, rows: list[Any]) -> list[Mutation]:
    """Spoil the second of some rows."""
    before, (row, *after) = rows[:1], rows[1:]

    def write(file: Path, text: str) -> None:
        file.write_text("\n".join([json.dumps(before[0]), text, *map(json.dumps, after)]) + "\n")

    size = len("\n".join(map(json.dumps, rows)))
    return list(chain(of_json(name, row, write), of_bytes(name, size, text=True)))


def parquet_mutations(name: str, size: int) -> list[Mutation]:
    """Spoil a table: its bytes, and the kinds of its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "numbers": pa.array([1, 2, 3]),
        "nulls": pa.nulls(3),
        "bytes": pa.array([b"\xff", b"a", b"b"]),
        "lists": pa.array([["a"], ["b"], []]),
        "objects": pa.array([{"a": 1}] * 3),
        "times": pa.array([0, 1, 2], pa.timestamp("s")),
        "nothing": pa.array([], pa.string()),
        "empty text": pa.array(["", "", ""]),
    }
    found = [
        Mutation(
            f"{name} text: {kind}", lambda f, c=c: pq.write_table(pa.table({"text": c}), f / name)
        )
        for kind, c in columns.items()
    ]
    two = pa.Table.from_arrays([pa.array(["a", "b"])] * 2, names=["text", "text"])
    other = pa.table({"texts": pa.array(["a", "b"])})
    found += [
        Mutation(f"{name} text: twice", lambda f: pq.write_table(two, f / name)),
        Mutation(f"{name} text: renamed", lambda f: pq.write_table(other, f / name)),
    ]
    return [*found, *of_bytes(name, size), *_more_flips(name, size)]


def _more_flips(name: str, size: int) -> Iterator[Mutation]:
    for each in range(40):
        position = (size * each) // 40
        yield Mutation(
            f"{name} byte {position} is inverted",
            lambda folder, at=position: _invert(folder / name, at),
        )


def _invert(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)
