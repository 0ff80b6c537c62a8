"""A GGUF file is read as the model that it was written from, or refused in one line."""

import json
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.checkpoints.directory import load_checkpoint, read_tensor
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.files.gguf import copies
from moezoo_models.files.gguf.copies import directory_of
from moezoo_models.files.gguf.header import read_header
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.finetune.pretrained import default_tokenizer, pretrained

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parent))

from gguf_writer import write_gguf  # noqa: E402 - beside this file

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
TEXT = "A café, naïve: 12 × 3\n"
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama_heads": LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, rope_parameters=PLAIN),
    # The sixth layer sees all, the others eight tokens, with angles of their own.
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7}, head_dim=32, sliding_window=8, query_pre_attn_scalar=32
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOEZOO_CACHE", str(folder))
    copies._copy_of.cache_clear()
    return folder / "gguf"


def build(name="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in key:
                parameter.add_(1.0)
    return model.eval()


def more(model):
    """Return the tensor by which llama.cpp divides rotary frequencies of Llama 3.1."""
    if model.config.rope_parameters.get("rope_type") != "llama3":
        return {}
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32, rope_parameters=PLAIN))
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    return {"rope_freqs.weight": divisors.numpy()}


def logits(model, length=24):
    tokens = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_the_one_that_was_written(name, tmp_path, capsys):
    model = build(name)
    file = write_gguf(tmp_path / "model.gguf", model, tensors=more(model))
    found, tokenizer = load_as_it_is(file)
    assert type(found) is type(model)
    source = model.state_dict()
    for key, tensor in found.state_dict().items():
        rounded = name == "gemma3" and "norm" in key  # the file has one more than the weight
        torch.testing.assert_close(tensor, source[key], rtol=0, atol=3e-7 if rounded else 0)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    ours, _ = load_checkpoint(file)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-4)
    said = capsys.readouterr().err
    assert re.search(r"model.gguf: F32: 32 bits per weight; [\d.]+ [kM]B in .*can be removed", said)
    assert found.config.rms_norm_eps == model.config.rms_norm_eps


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [("Q8_0", torch.float32, 5e-3), ("F16", torch.float16, 0), ("BF16", torch.bfloat16, 0)],
)
def test_numbers_are_those_of_the_file(kind, dtype, error, tmp_path):
    model = build()
    if not error:
        model = model.to(dtype)
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    directory = directory_of(file)
    found = load_file(directory / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == dtype
        assert float((found[name].double() - tensor.double()).abs().max()) <= error
    name = "model.layers.1.mlp.down_proj.weight"
    raw = gguf.quantize(model.state_dict()[name].float().numpy(), gguf.GGMLQuantizationType[kind])
    exact = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert torch.equal(found[name].float(), torch.from_numpy(exact))
    assert json.loads((directory / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_halves_that_norms_do_not_fit_are_written_wide(tmp_path):
    model = build()  # its norms are of fp32
    directory = directory_of(write_gguf(tmp_path / "model.gguf", model, "F16"))
    found = load_file(directory / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert torch.equal(found["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    model = build("qwen2")
    monkeypatch.setattr(copies, "_SHARD", 50_000)
    directory = directory_of(write_gguf(tmp_path / "model.gguf", model))
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(logits(load_as_it_is(directory)[0]), logits(model))


def test_a_copy_is_made_once_and_read_again(tmp_path, cache, capsys):
    file = write_gguf(tmp_path / "model.gguf", build())
    directory = directory_of(file)
    assert directory.parent == cache
    before = (directory / "model.safetensors").stat().st_mtime_ns
    copies._copy_of.cache_clear()
    other = shutil.copy(file, tmp_path / "other.gguf")
    capsys.readouterr()
    assert directory_of(tmp_path / "other.gguf") == directory
    assert f"{other}: F32: 32 bits per weight" in capsys.readouterr().err
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    # What is not whole is made anew.
    (directory / "model.safetensors").write_bytes(b"half")
    copies._copy_of.cache_clear()
    load_as_it_is(directory_of(file))
    changed = write_gguf(tmp_path / "other.gguf", build("qwen3"))
    assert directory_of(changed) != directory
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        [directory.name, directory_of(changed).name]
    )


def test_a_directory_with_one_file_is_that_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_gguf(folder / "model.gguf", build())
    assert directory_of(folder) == directory_of(file)
    torch.testing.assert_close(logits(load_as_it_is(folder)[0]), logits(build()))
    shutil.copy(file, folder / "second.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF files; name one, e\.g\. .*model\.gguf"):
        load_as_it_is(folder)
    # Weights of its own win, whatever lies beside them.
    build().save_pretrained(folder)
    assert directory_of(folder) == folder


def test_digits_are_set_apart_where_the_model_was_trained_so(tmp_path):
    found = {}
    for split in ("gpt-2", "smollm"):
        tokenizer = load_tokenizer(write_gguf(tmp_path / f"{split}.gguf", build(), tokens=split))
        ids = tokenizer.encode("he  12 he")
        assert tokenizer.decode(ids) == "he  12 he"
        found[split] = tokenizer.hf.convert_ids_to_tokens(ids)
    # GPT-2 keeps a space with the digit behind it; set apart, two spaces stay together.
    assert found["gpt-2"] == ["he", "Ġ", "Ġ1", "2", "Ġ", "he"]
    assert found["smollm"] == ["he", "ĠĠ", "1", "2", "Ġ", "he"]
    assert tokenizer.eos_id == 1


@pytest.mark.parametrize(("adds", "opens"), [(True, 0), (False, None), (None, 0)])
def test_texts_begin_as_the_file_says(adds, opens, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", build(), adds_bos=adds)
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (opens, 1)
    theirs = AutoTokenizer.from_pretrained(directory_of(file))("he").input_ids
    assert tokenizer.opening + tokenizer.encode("he") == theirs
    assert tokenizer.opening == ([0] if adds else [])
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").bos_id == opens
    assert load_tokenizer(tmp_path / "saved").opening == tokenizer.opening


def test_an_unknown_tokenizer_is_left_out_and_said(tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", build(), tokens="elvish")
    _, tokenizer = load_as_it_is(file)
    assert tokenizer is None
    said = capsys.readouterr().err
    assert "moezoo: warning: how its tokenizer splits text into words, 'elvish', is not" in said
    bare = write_gguf(tmp_path / "bare.gguf", build(), tokens=False)
    assert load_as_it_is(bare)[1] is None
    assert main(["generate", "--checkpoint", str(bare)]) == 2
    assert "holds no tokenizer; copy its files there or set tokenizer" in capsys.readouterr().err


def test_every_command_that_reads_a_model_reads_the_file(tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", build(), "Q8_0")
    text = tmp_path / "text.txt"
    text.write_text("some text, 1 + 1\n" * 400)
    options = ["--calibration", str(text), "--window", "32", "--calibration_tokens", "256"]
    options += ["--held_out_tokens", "64"]
    assert read_header(file).describe().startswith("Q8_0: 8.5 bits per weight, dequantized; ")
    commands = [
        ["generate", f"--checkpoint={file}", "--prompt=ab", "--max_new_tokens=3"],
        ["evaluate", f"--checkpoint={file}", f"--text={text}"],
        ["inspect", "sparsity", f"--checkpoint={file}", f"--text={text}"],
        ["inspect", "carving", str(file), "--sizes=[S1A1E4]", *options],
        ["carve", str(file), str(tmp_path / "carved"), *options, "--shared=1", "--experts=4"],
        ["upcycle", str(file), str(tmp_path / "upcycled"), "--experts=2", "--to=mixtral"],
        ["export", str(file), str(tmp_path / "stock")],
    ]
    for command in commands:
        assert main(command) == 0, command
    expected = logits(load_as_it_is(file)[0])
    for name in ("upcycled", "stock"):
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (tmp_path / name / "tokenizer.json").is_file()
    assert read_tensor(file, "model.embed_tokens.weight").shape == (300, 64)
    assert default_tokenizer(str(file)) == str(file)
    start = pretrained(str(file), 300, "sdpa")
    torch.testing.assert_close(logits(start.eval()), expected, rtol=1e-4, atol=1e-4)
    # A mixture it is not, and the line says so.
    capsys.readouterr()
    assert main(["adopt", str(file)]) == 2
    assert "mixture" in capsys.readouterr().err


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(file):
    file.write_bytes(file.read_bytes()[:300])


def other_magic(file):
    file.write_bytes(b"GGML" + file.read_bytes()[4:])


def other_version(file):
    file.write_bytes(b"GGUF" + struct.pack("<I", 1) + file.read_bytes()[8:])


def many_keys(file):
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack("<Q", 1 << 60)
    file.write_bytes(content)


def many_tensors(file):
    content = bytearray(file.read_bytes())
    content[8:16] = struct.pack("<Q", 1 << 60)
    file.write_bytes(content)


def other_type(file):
    content = bytearray(file.read_bytes())
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 4)
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


DAMAGES = {
    cut: "is truncated or damaged (it has ",
    cut_header: "is truncated or damaged (its header goes on after 300 bytes)",
    other_magic: "is no GGUF file: it does not begin with GGUF; copy it again",
    other_version: "is GGUF of version 1, and 2 and 3 in little-endian order are read",
    many_keys: "is truncated or damaged (",
    many_tensors: "is truncated or damaged (",
    other_type: "is type 4, which the package gguf cannot dequantize; get the file in another",
    empty: "is no GGUF file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_damaged_files_are_refused_in_one_line(damage, tmp_path, cache):
    file = write_gguf(tmp_path / "model.gguf", build())
    damage(file)
    with pytest.raises(InputError) as refusal:
        load_as_it_is(file)
    assert str(refusal.value).startswith("checkpoint: ")
    assert DAMAGES[damage] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"^tokenizer: "):
        load_tokenizer(file)
    assert not cache.exists() or not list(cache.iterdir())


def weight(*shape):
    return torch.ones(*shape).numpy()


LOSSES = [
    (
        {"arch": "elvish"},
        "general.architecture: 'elvish' of .* is not read; choose from: gemma3, llama",
    ),
    ({"keys": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: .* has 'yarn' there, whi"),
    ({"keys": {"rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor: .* has 4.0 there"),
    ({"keys": {"expert_count": 8}}, "llama.expert_count: .* has 8 there"),
    ({"keys": {"attention.head_count": [4, 4]}}, "head_count: .* has a list of 2 there, one per"),
    ({"keys": {"attention.value_length": 8}}, "llama.attention.value_length: .* has 8 there and"),
    ({"keys": {"rope.dimension_count": 8}}, "llama.rope.dimension_count: .* has 8 there and heads"),
    ({"keys": {"embedding_length": 32}}, "has shape .*, by its keys"),
    ({"keys": {"block_count": 3}}, "llama.block_count: .* has 3 there, and tensors of 2; copy"),
    ({"keys": {"block_count": None}}, "llama.block_count: .* has None there; copy it again"),
    ({"tensors": {"blk.0.attn_q.bias": weight(64)}}, "'blk.0.attn_q.bias' in .* has no place in"),
    ({"tensors": {"rope_freqs.weight": weight(8) * 3}}, "rope_freqs.weight: .* divides rotary"),
]


@pytest.mark.parametrize(("options", "message"), LOSSES)
def test_what_would_come_out_as_another_model_is_refused(options, message, tmp_path, cache):
    file = write_gguf(tmp_path / "model.gguf", build(), **options)
    with pytest.raises(InputError, match=message) as refusal:
        load_as_it_is(file)
    assert "\n" not in str(refusal.value)
    assert not list(cache.iterdir())


def test_too_little_room_and_no_folder_are_refused(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", build())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
        with pytest.raises(InputError, match=r"dequantized needs [\d.]+ MB, and .* has 1\.0 kB fr"):
            directory_of(file)
    assert not list(cache.iterdir())
    monkeypatch.setenv("MOEZOO_CACHE", str(file))
    with pytest.raises(InputError, match="set MOEZOO_CACHE to a folder that can be written"):
        directory_of(file)


def test_after_an_error_nothing_is_left(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", build())
    monkeypatch.setattr(copies, "seal", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(InputError, match=r"cannot be written to .* \(no space\); free space"):
        directory_of(file)
    assert not list(cache.iterdir())


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "model.gguf", build())
    from moezoo_models.files.gguf import header

    header._known.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main(["generate", "--checkpoint", str(file)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["moezoo: error: gguf is not installed; run: pip install 'moezoo[gguf]'"]


def test_the_header_says_what_is_in_it(tmp_path):
    header = read_header(write_gguf(tmp_path / "model.gguf", build(), "Q8_0"))
    assert header.architecture == "llama"
    assert header.get("block_count") == 2
    assert header.tensors["blk.1.ffn_down.weight"].shape == (64, 96)
    assert header.tensors["blk.1.ffn_down.weight"].kind == "Q8_0"
    assert header.describe().startswith("Q8_0: 8.5 bits per weight, dequantized; ")
    assert header.numel == sum(t.numel() for t in build().state_dict().values())
