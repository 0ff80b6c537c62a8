"""Commands in CPU-seconds: start-up against importing torch, conversions against mergekit."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moezoo.bench.case import Case, Peer, Setting, Target, Unavailable
from moezoo.bench.end_to_end import Job, Spent, Task, run_command

_MOEZOO = (sys.executable, "-m", "moezoo")
_READ_AND_WRITE = """
import os, sys
from safetensors.torch import load_file, save_file
os.makedirs(os.path.dirname(sys.argv[2]))
save_file(load_file(sys.argv[1]), sys.argv[2])
"""


def _startup(setting: Setting, folder: Path, words: Sequence[str], printed: str) -> Task:
    def answer() -> dict[str, Tensor]:
        output = run_command([*_MOEZOO, *words]).output
        if printed not in output:
            raise RuntimeError(f"moezoo {' '.join(words)} does not print '{printed}'")
        return {"the output": torch.tensor(list(output.encode()))}

    return Task(Job(lambda: run_command([*_MOEZOO, *words]).spent, answer), None)


def _import_torch(parts: None) -> Job:
    words = [sys.executable, "-c", "import torch"]
    return Job(lambda: run_command(words).spent, dict)


@dataclass(frozen=True)
class Conversion:
    """A dense checkpoint, a folder to write to, and how many experts to make."""

    source: Path
    folder: Path
    experts: int

    def job(self, words: Sequence[str | Path], target: Path, note: str = "") -> Job:
        """Return a command's job; its answer is the tensors that it writes, without routers.

        Those are drawn at random.
        """

        def run() -> Spent:
            shutil.rmtree(target, ignore_errors=True)
            return run_command([str(word) for word in words]).spent

        def answer() -> dict[str, Tensor]:
            run()
            return {
                name: tensor.flatten().view(torch.uint8)
                for path in sorted(target.glob("*.safetensors"))
                for name, tensor in load_file(path).items()
                if not name.endswith("gate.weight")
            }

        return Job(run, answer, note=note)


def _convert(setting: Setting, folder: Path, command: str) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    from moezoo_models.checkpoints.directory import quiet
    from moezoo_models.text.corpus import open_corpus
    from moezoo_train.data.train_tokenizer import train_tokenizer

    source, target = folder / "dense", folder / "ours"
    text = itertools.islice(open_corpus("stdlib", "text").documents(), 40)
    words = train_tokenizer(list(text), source, setting["V"], 200_000)
    config = LlamaConfig(
        vocab_size=words.vocab_size,
        hidden_size=setting["d"],
        intermediate_size=setting["h"],
        num_hidden_layers=setting["L"],
        num_attention_heads=setting["d"] // 32,
        num_key_value_heads=setting["d"] // 32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=words.eos_id,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(source)
    parts = Conversion(source, folder, setting["E"])
    options = ["--experts", str(setting["E"])]
    if command == "carve":
        tokens = str(setting["T"])
        options += ["--calibration_tokens", tokens, "--held_out_tokens", tokens]
    return Task(parts.job([*_MOEZOO, command, source, target, *options], target), parts)


def _mergekit(parts: Conversion) -> Job:
    """mergekit-moe, with random routers as ours has them."""
    program = shutil.which("mergekit-moe")
    if program is None:
        raise Unavailable("not installed; pip install mergekit, in an environment of its own")
    recipe, target = parts.folder / "mergekit.yml", parts.folder / "mergekit"
    settings = {
        "base_model": str(parts.source),
        "architecture": "mixtral",
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [{"source_model": str(parts.source)}] * parts.experts,
    }
    recipe.write_text(json.dumps(settings))  # JSON is YAML, too
    return parts.job([program, recipe, target], target)


def _no_carving(parts: Conversion) -> Job:
    raise Unavailable("mergekit cannot carve: it has no command that cuts a block into experts")


def _copy(parts: Conversion) -> Job:
    """Read the checkpoint and write it, in a process that imports torch for it."""
    target = parts.folder / "copy"
    weights = parts.source / "model.safetensors"
    return parts.job(
        [sys.executable, "-c", _READ_AND_WRITE, weights, target / weights.name],
        target,
        note="imports torch, reads and writes the dense checkpoint",
    )


def _command_case(name: str, words: Sequence[str], printed: str, target: float | None) -> Case:
    wanted = Target(forward=target) if target else None
    return Case(
        f"start-{name}",
        "end-to-end",
        f"moezoo {' '.join(words)}",
        {},
        {},
        partial(_startup, words=words, printed=printed),
        {"import torch": Peer(_import_torch, same=False, target=wanted)},
        unit="CPU-s",
    )


def _conversion_case(name: str, sizes: dict[str, int], mergekit: Peer) -> Case:
    return Case(
        name,
        "end-to-end",
        f"moezoo {name}",
        {"V": 2048, "d": 256, "h": 704, "L": 4, "E": 8, **sizes},
        {"V": 400, "d": 32, "h": 64, "L": 1, **({"T": 512} if sizes else {})},
        partial(_convert, command=name),
        {"mergekit": mergekit, "reading and writing it": Peer(_copy, same=False)},
        unit="CPU-s",
    )


CASES = [
    _conversion_case("upcycle", {}, Peer(_mergekit)),
    _conversion_case("carve", {"T": 4096}, Peer(_no_carving)),
    # At most 0.4 CPU-s where torch takes 3.6.
    _command_case("help", ["--help"], "moezoo COMMAND", 9.0),
    _command_case("zoo", ["zoo"], "methods at d_model", 9.0),
    _command_case("fit-help", ["fit", "--help"], "--model.d_model", None),
]
