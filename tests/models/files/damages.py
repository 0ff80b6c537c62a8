"""Readers of model directories, and ways to damage one, that the tests of the gate share."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from moezoo import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.checkpoints.export import export
from moezoo_models.checkpoints.stock import load_any_with_tokenizer, load_as_it_is
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.generate import generate
from moezoo_models.inspect.sparsity import inspect_sparsity
from moezoo_models.inspect.spectrum import inspect_spectrum
from moezoo_models.inspect.usage import inspect_usage
from moezoo_train.finetune.pretrained import pretrained

OURS = {
    "load_checkpoint": lambda directory, place: load_checkpoint(directory),
    "load_as_it_is": lambda directory, place: load_as_it_is(directory),
    "load_any": lambda directory, place: load_any_with_tokenizer(directory),
    "from_pretrained": lambda directory, place: MoezooForCausalLM.from_pretrained(directory),
    "generate": lambda directory, place: generate(directory, max_new_tokens=1, stream=False),
    "evaluate": lambda directory, place: evaluate(directory, place / "text.txt"),
    "inspect usage": lambda directory, place: inspect_usage(
        directory, place / "text.txt", output=place / "out"
    ),
    "inspect sparsity": lambda directory, place: inspect_sparsity(
        directory, place / "text.txt", output=place / "out"
    ),
    "inspect spectrum": lambda directory, place: inspect_spectrum(
        directory, place / "text.txt", output=place / "out"
    ),
    "fit": lambda directory, place: pretrained(str(directory), 300, "sdpa"),
    "export": lambda directory, place: export(directory, place / "out"),
}
LLAMA = {
    **{name: OURS[name] for name in ("load_checkpoint", "load_as_it_is", "generate", "fit")},
    "open_source": lambda directory, place: _read_all(directory),
    "upcycle": lambda directory, place: upcycle(directory, place / "out", experts=2),
    "carve": lambda directory, place: carve(
        directory,
        place / "out",
        calibration=str(place / "text.txt"),
        calibration_tokens=64,
        held_out_tokens=32,
        window=16,
    ),
}
AUTO = (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained)


def _read_all(directory):
    with open_source(directory) as source:
        for name in source.tensors:
            source.read(name)


def change_config(**fields):
    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def change_tensors(change):
    def write(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return write


def index_of(value):
    def write(directory):
        names = dict.fromkeys(load_file(directory / "model.safetensors"), value)
        shutil.copy(directory / "model.safetensors", directory.with_name("x.safetensors"))
        (directory / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": names}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def link_out(directory):
    file = directory / "model.safetensors"
    shutil.move(file, directory.with_name("x.safetensors"))
    file.symlink_to(directory.with_name("x.safetensors"))


def replace_by_link(name):
    def write(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("nowhere")

    return write


def flip_a_bit(directory):
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def metadata(value):
    def write(directory):
        file = directory / "model.safetensors"
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(json.loads(content[8:start]) | {"__metadata__": value}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])

    return write


def config_text(old, new, end=""):
    def write(directory):
        file = directory / "config.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1) + end)

    return write


def generation(content):
    return lambda directory: (directory / "generation_config.json").write_text(content)


def poison(value):
    def change(tensors):
        tensors["model.norm.weight"][3] = value

    return change_tensors(change)


def cast(dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    return change_tensors(change)


def refusal(read, directory, place):
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError) as caught:
        read(directory, place)
    assert [file for file in sorted(place.rglob("*")) if file not in before] in (
        [],
        [place / "out"],  # what inspect makes before it reads the model
    )
    return re.sub("^(checkpoint|initialize_from): ", "", str(caught.value))


def all_refuse(readers, directory, place, message):
    lines = {name: refusal(read, directory, place) for name, read in readers.items()}
    assert len(set(lines.values())) == 1, lines
    (line,) = set(lines.values())
    assert "\n" not in line
    assert re.search(message, line), line
