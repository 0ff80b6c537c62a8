"""Exported files in llama.cpp: the same greedy tokens, log-probabilities and token ids.

Skipped where xllamacpp is not installed.
"""

import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.export.gguf import export_gguf
from moezoo_models.export.gguf.pre_tokenizers import _LLAMA3, _QWEN2
from moezoo_models.export.gguf.samples import SAMPLES
from moezoo_models.text.tokenizer import load_tokenizer

PROMPTS = ([5, 9, 33], [100, 2, 7, 150, 31, 8], [60])
STEPS = 20
KINDS = [
    "llama",
    "llama, biases",
    "llama, tied",
    "llama, linear",
    "llama, llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "olmo2, tied",
    "mixtral",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe, no shared expert",
    "glm4_moe, two shared experts",
    "glm4_moe, biases, norms",
    "glm4_moe, first layer dense",
    "glm4_moe, half rotated",
    "granitemoe",
    "granitemoe, biases",
]


def test_every_kind_is_here(kinds):
    assert list(kinds) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind, stock, llama_cpp, tmp_path):
    directory, model = stock(kind)
    server = llama_cpp(export_gguf(directory, tmp_path / "model.gguf", "f32"))
    for prompt in PROMPTS:
        tokens, found = server.greedy(prompt, STEPS, model.config.vocab_size)
        assert len(tokens) == len(found) == STEPS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        expected[:, 0] = -torch.inf  # the end of text, which was forbidden
        assert expected.argmax(-1).tolist() == tokens


def split(regex):
    steps = [Split(Regex(regex), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    return Sequence(steps)


PRE_TOKENIZERS = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (
        Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        False,
    ),
    "llama-bpe": (split(_LLAMA3), True),
    "dbrx": (split(_LLAMA3), False),
    "qwen2": (split(_QWEN2), False),
}
CODE = "".join(SAMPLES) * 2


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_the_same(name, bpe, stock, llama_cpp, tmp_path):
    pre_tokenizer, ignores = PRE_TOKENIZERS[name]
    own = bpe(pre_tokenizer, ignore_merges=ignores, size=900, text=CODE, ascii=False)
    directory, _ = stock("llama", tokenizer=own, vocab_size=901)
    server = llama_cpp(export_gguf(directory, tmp_path / "model.gguf", "f32"))
    tokenizer = load_tokenizer(directory)
    for text in SAMPLES:
        assert server.encode(text) == tokenizer.encode(text), text
    every = [token for text in SAMPLES for token in tokenizer.encode(text)]
    assert len(set(every)) > 250  # with merges, of many kinds


def test_llama_cpp_cuts_text_as_sentencepiece(stock, pieces, llama_cpp, tmp_path):
    directory, _ = stock("llama", tokenizer=pieces, vocab_size=520)
    server = llama_cpp(export_gguf(directory, tmp_path / "model.gguf", "f32"))
    for text in SAMPLES:
        assert server.encode(text) == pieces.encode(text), text


def test_a_tokenizer_that_cuts_otherwise_is_caught(stock, llama_cpp, tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(
        "moezoo_models.export.gguf.vocabulary.pre_tokenizer_of", lambda definition: "gpt-2"
    )
    own = bpe(split(_LLAMA3), size=900, text=CODE, ascii=False)
    directory, _ = stock("llama", tokenizer=own, vocab_size=901)
    with pytest.raises(ValueError, match=r"tokenizer: llama.cpp encodes .* otherwise, from token"):
        export_gguf(directory, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


SIGMOID = {"score": "sigmoid", "selection_bias": True}
OURS = {
    "llama": {"ffn": [{"class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 96}}]},
    "mixtral": {"ffn": [{"class_path": "moezoo.SparseMoE", "init_args": {"num_experts": 4}}]},
    "glm4_moe": {
        "qk_norm": True,
        "ffn": [
            {
                "class_path": "moezoo.SparseMoE",
                "init_args": {
                    "num_experts": 4,
                    "d_expert": 32,
                    "num_shared_experts": 1,
                    "router": SIGMOID,
                },
            }
        ],
    },
}


@pytest.mark.parametrize("kind", OURS)
def test_llama_cpp_computes_what_ours_do(kind, make, bpe, llama_cpp, tmp_path):
    fields = {"vocab_size": 304, "hidden_size": 64, **OURS[kind]}
    fields["ffn"] = [{"layers": "all", **each} for each in fields["ffn"]]
    model = make(**fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(tmp_path / "ours", model, bpe())
    server = llama_cpp(export_gguf(tmp_path / "ours", tmp_path / "model.gguf", "f32"))
    for prompt in PROMPTS:
        tokens, found = server.greedy(prompt, STEPS, 304)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        expected[:, 0] = -torch.inf
        assert expected.argmax(-1).tolist() == tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "ours"]
