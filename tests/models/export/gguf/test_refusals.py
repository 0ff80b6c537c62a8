"""What llama.cpp would compute otherwise is refused in one line, and nothing is left behind."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.export.gguf import export_gguf
from moezoo_models.export.gguf.sentencepiece import read_normalization
from moezoo_models.text.tokenizer import HuggingFaceTokenizer

pytest.importorskip("gguf")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("qwen2_moe", {"num_experts": 4}, "model_type: llama.cpp's qwen2moe .* glm4_moe instead"),
        (
            "flex_olmo",
            {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None},
            "not know flex_olmo",
        ),
        ("gemma2", {"head_dim": 16}, "model_type: 'gemma2' has no GGUF export; choose from: "),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: llama.cpp computes silu .* 'gelu'"),
        ("mistral", {"sliding_window": 127}, "sliding_window: .* all of 128 .* and not to 127"),
        ("mixtral", {"sliding_window": 8}, "sliding_window: "),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_window: ",
        ),
        ("llama", {"rope_parameters": YARN}, "rope_type 'yarn' of a llama was not compared"),
        ("qwen3", {"rope_parameters": LINEAR}, "rope_type 'linear' of a qwen3 was not compared"),
        ("qwen3", {"attention_bias": True}, "attention_bias: llama.cpp's qwen3 has no such"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias: llama.cpp's qwen3moe has no such"),
        ("olmo2", {"attention_bias": True}, "attention_bias: llama.cpp's olmo2 has no such"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers: llama.cpp has no dense layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "mlp_only_layers: llama.cpp has no dense"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: llama.cpp divides"),
        ("glm4_moe", {"n_group": 2, "topk_group": 2}, "n_group: choosing within 2 groups"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace: 2 of 2 layers"),
    ],
)
def test_models(kind, fields, message, stock, tmp_path):
    directory, _ = stock(kind, **fields)
    with pytest.raises(InputError, match=message):
        export_gguf(directory, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_window_that_holds_all_positions_is_none(stock, tmp_path):
    directory, _ = stock("mistral", sliding_window=128)
    assert export_gguf(directory, tmp_path / "model.gguf").is_file()


def spoil(directory, **changes):
    """Change tensors of a model; checksums are of models of ours only."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})


def test_numbers(stock, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    directory, _ = stock("llama")
    spoil(directory, **{name: torch.full((96, 64), 65536.0)})
    with pytest.raises(InputError, match=r"dtype: 'blk.1.ffn_up.weight' holds .* --dtype f32"):
        export_gguf(directory, tmp_path / "model.gguf", "f16")
    assert export_gguf(directory, tmp_path / "f32.gguf", "f32").is_file()
    spoil(directory, **{name: torch.full((96, 64), torch.nan)})
    with pytest.raises(InputError, match=r"'blk.1.ffn_up.weight' in .* holds NaN or infinity"):
        export_gguf(directory, tmp_path / "model.gguf", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f32.gguf", "model"]


def test_a_missing_expert(stock, tmp_path):
    directory, _ = stock("mixtral")
    spoil(directory, **{"model.layers.1.block_sparse_moe.experts.3.w1.weight": None})
    with pytest.raises(InputError, match="checkpoint: "):
        export_gguf(directory, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def changed(bpe, **parts):
    """A byte-level BPE with another part."""
    tokenizer = bpe(ascii=False, size=300)
    for name, part in parts.items():
        setattr(tokenizer.hf.backend_tokenizer, name, part)
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.hf.backend_tokenizer, eos_token="<|end|>"
        )
    )


def words(model):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    )


def test_tokenizers(bpe, stock, tmp_path):
    level = pre_tokenizers.ByteLevel
    split = pre_tokenizers.Split(" ", "isolated")
    merged = bpe(ascii=False)
    vocabulary = {"<|end|>": 0, "a": 1}
    cases = {
        "its pre-tokenizer .* is none": [
            changed(bpe, pre_tokenizer=level(add_prefix_space=True)),
            changed(bpe, pre_tokenizer=level(add_prefix_space=False, use_regex=False)),
            changed(
                bpe,
                pre_tokenizer=pre_tokenizers.Sequence(
                    [split, level(add_prefix_space=False, use_regex=False)]
                ),
            ),
            changed(
                bpe,
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(), level(add_prefix_space=False)]
                ),
            ),
            bpe(ignore_merges=True, ascii=False),
        ],
        "its normalizer .* is none": [changed(bpe, normalizer=normalizers.NFKC())],
        "tokenizer.json is no byte-level BPE": [
            words(models.WordLevel(vocabulary, unk_token="<|end|>")),
            words(models.BPE(vocabulary, [], byte_fallback=True)),
        ],
        "it has no merges": [
            changed(bpe, model=models.BPE({"<|end|>": 0, "a": 1}, [])),
        ],
        "it has 400 tokens, the model 304": [bpe(ascii=False, size=400, text="ab cd " * 999)],
    }
    assert merged.vocab_size <= 304
    for number, (message, tokenizers) in enumerate(cases.items()):
        for place, tokenizer in enumerate(tokenizers):
            if "400" in message:
                tokenizer.hf.add_tokens([f"<{n}>" for n in range(400 - tokenizer.vocab_size)])
            directory, _ = stock("llama", folder=f"{number} {place}", tokenizer=tokenizer)
            with pytest.raises(InputError, match=f"tokenizer: {message}"):
                export_gguf(directory, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_two_tokenizers_in_one_directory(bpe, pieces, stock, tmp_path):
    directory, _ = stock("llama", vocab_size=520, tokenizer=bpe(ascii=False, size=300))
    (directory / "tokenizer.model").write_bytes(pieces.sentencepiece_model)
    with pytest.raises(InputError, match=r"tokenizer\.json and tokenizer.model give"):
        export_gguf(directory, tmp_path / "model.gguf")


def test_a_full_disk_leaves_nothing(stock, tmp_path, monkeypatch):
    def write(self, tensor, *_):
        raise OSError("304 requested and 0 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", write)
    directory, _ = stock("llama")
    place = tmp_path / "new" / "model.gguf"
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # for which a file is written before
    with pytest.raises(OSError, match="No space left") as full:
        export_gguf(directory, place)
    assert full.value.filename == str(place)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_sentencepieces(pieces):
    model = pieces.sentencepiece_model
    assert read_normalization(model).add_space_prefix is False
    spaced = _field(3, _number(3, 1) + _number(4, 0))
    assert read_normalization(model + spaced).add_space_prefix is True
    for part, problem in (
        (_field(2, _number(3, 1) + _number(35, 1)), "is no BPE"),
        (_field(2, _number(3, 2)), "has no tokens for bytes"),
        (_field(3, _field(2, b"x")), "rewrites characters"),
        (_field(3, _number(4, 1)), "removes spaces"),
        (_field(3, _number(4, 0) + _number(5, 0)), "leaves spaces as they are"),
        (b"\x13", "is damaged"),
        (b"\x12\x7f", "is damaged"),
    ):
        with pytest.raises(InputError, match=f"tokenizer: tokenizer.model {problem}"):
            read_normalization(model + part)


def _number(field, value):
    """Write a number of a protocol buffer."""
    tag = field << 3
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes([value])


def _field(field, content):
    return bytes([field << 3 | 2, len(content)]) + content


def test_the_command(stock, bpe, tmp_path, capsys, monkeypatch):
    directory, _ = stock("llama")
    file = tmp_path / "model.gguf"

    def fail(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        line = capsys.readouterr().err.strip()
        assert line.count("\n") == 0
        return line.removeprefix("moezoo: error: ")

    assert main(["export", str(directory), str(file), "--dtype", "q8_0"]) == 0
    assert "llama" in capsys.readouterr().out
    assert fail(directory, file).startswith(f"target: {file} is there already; name a new file")
    other = tmp_path / "other"
    assert fail(directory, other, "--dtype", "f16").startswith("dtype: is for GGUF files")
    assert fail(directory, other, "--text", "x.txt").startswith("text: is for GGUF files")
    assert fail(directory, other, "--format", "onnx").startswith("format: 'onnx' is not one of")
    assert fail(directory, f"{other}.gguf", "--dtype", "q4").startswith("dtype: 'q4' is not one of")
    assert fail(directory, f"{other}.gguf", "--base", "x").startswith("base: is for training")
    (tmp_path / "last.ckpt").touch()
    assert fail(tmp_path / "last.ckpt", f"{other}.gguf").startswith("target: a training checkpoint")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert "holds no tokenizer" in fail(directory, f"{other}.gguf")
    bpe().save(tmp_path / "words")
    found = [str(directory), f"{other}.gguf", "--tokenizer", str(tmp_path / "words")]
    assert main(["export", *found]) == 0
    (tmp_path / "other.gguf").unlink()
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = fail(directory, f"{other}.gguf")
    assert line.endswith("run: pip install 'moezoo[gguf]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt",
        "model",
        "model.gguf",
        "words",
    ]
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
