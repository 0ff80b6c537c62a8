"""Every directory of weights that is written here says which of its files was changed later."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models.checkpoints.directory import read_tensor, save_checkpoint
from moezoo_models.checkpoints.export import export
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.upcycle import upcycle

DENSE = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}


@pytest.fixture
def exported(make, tmp_path):
    save_checkpoint(tmp_path / "ours", make(ffn=[DENSE]))
    return export(tmp_path / "ours", tmp_path / "exported")


@pytest.fixture
def upcycled(dense, tmp_path):
    directory = tmp_path / "upcycled"
    upcycle(dense("llama"), directory, experts=4, top_k=2, to="mixtral", max_shard_size="120KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture
def carved(readable, text, tmp_path):
    directory = tmp_path / "carved"
    carve(
        readable(), directory, experts=6, shared=1, active=3, refit=False, sparsified=False, **text
    )
    return directory


@pytest.fixture(params=["exported", "upcycled", "carved"])
def directory(request):
    return request.getfixturevalue(request.param)


def flip(file, position) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def span(file) -> tuple[int, int]:
    """Return where tensors begin and end."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little"), file.stat().st_size


def test_a_flipped_bit_is_named_by_all_that_read(directory):
    """The lowest bit of a number, at the beginning, in the middle and at the end of each file."""
    load_as_it_is(directory)
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        first, end = span(file)
        for position in (first, (first + end) // 2, end - 1):
            flip(file, position)
            with pytest.raises(InputError, match=f"{file} is truncated or damaged .*checksum"):
                load_as_it_is(directory)
            flip(file, position)
    flip(files[0], span(files[0])[0])
    with safe_open(files[0], framework="pt") as tensors:
        name = next(iter(tensors.keys()))
    with pytest.raises(InputError, match=f"{files[0]} is truncated or damaged"):
        read_tensor(directory, name)


def test_unmodified_transformers_takes_it_for_any_other_file(directory):
    for file in directory.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8 : span(file)[0]])
        assert set(header["__metadata__"]) == {"format", "crc32"}
        assert span(file)[0] % 8 == 0
    stock, problems = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(problems.values())
    own = load_as_it_is(directory)[0].state_dict()
    assert len(own) > 20
    found = stock.state_dict()
    assert all(torch.equal(own[name], found[name]) for name in found)


def test_conversion_refuses_a_source_that_was_changed(exported, tmp_path):
    file = exported / "model.safetensors"
    flip(file, span(file)[1] - 1)
    with pytest.raises(InputError, match=f"{file} is truncated or damaged"):
        upcycle(exported, tmp_path / "out", experts=4, top_k=2)
    assert not (tmp_path / "out").exists()
