"""What is in an exported file, read back by the gguf package: keys, shapes, every number."""

import json

import numpy as np
import pytest
import torch

from moezoo_models.checkpoints.stock import load_stock
from moezoo_models.export.gguf import export_gguf
from moezoo_models.export.gguf.rounding import measure_rounding, round_weights
from moezoo_models.text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")


def contents(file):
    """Return keys and tensors of a file, the latter in fp32 and in torch's order."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        each.name: torch.from_numpy(np.array(gguf.quants.dequantize(each.data, each.tensor_type)))
        for each in reader.tensors
    }
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    return keys, tensors, kinds


def pairs(weight, heads):
    """Order rows for rotated neighbours, row by row: the halves of each head take turns."""
    width = len(weight) // heads
    rows = [h * width + (i % 2) * width // 2 + i // 2 for h in range(heads) for i in range(width)]
    return weight[rows]


def expected_tensors(model):
    """Name the tensors of a model in memory as llama.cpp does."""
    config, kind = model.config, model.config.model_type
    post = kind == "olmo2"
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.gate.weight": "ffn_gate_inp.weight",
        "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mlp.experts.down_proj": "ffn_down_exps.weight",
        "block_sparse_moe.experts.down_proj": "ffn_down_exps.weight",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
    }
    if post or kind == "glm4_moe":
        names["post_attention_layernorm.weight"] = "post_attention_norm.weight"
        names["post_feedforward_layernorm.weight"] = "post_ffw_norm.weight"
    for end in ("weight", "bias"):
        names |= {f"self_attn.{x}_proj.{end}": f"attn_{x}.{end}" for x in "qkv"}
        names[f"self_attn.o_proj.{end}"] = f"attn_output.{end}"
        for x in ("gate", "up", "down"):
            names[f"mlp.{x}_proj.{end}"] = f"ffn_{x}.{end}"
            names[f"mlp.shared_experts.{x}_proj.{end}"] = f"ffn_{x}_shexp.{end}"
    found = {}
    for name, tensor in model.state_dict().items():
        outside = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name in outside:
            found[outside[name]] = tensor
            continue
        _, _, number, inner = name.split(".", 3)
        block = f"blk.{number}."
        if inner.endswith("experts.gate_up_proj"):
            half = tensor.shape[1] // 2
            found[f"{block}ffn_gate_exps.weight"] = tensor[:, :half]
            found[f"{block}ffn_up_exps.weight"] = tensor[:, half:]
            continue
        if kind in ("llama", "mistral", "mixtral", "granitemoe"):
            if inner.startswith("self_attn.q_proj"):
                tensor = pairs(tensor, config.num_attention_heads)
            if inner.startswith("self_attn.k_proj"):
                tensor = pairs(tensor, config.num_key_value_heads)
        if tensor.numel():
            found[block + names[inner]] = tensor
    if config.tie_word_embeddings and not post:
        found.pop("output.weight", None)
    if config.rope_parameters["rope_type"] == "llama3":
        inverse = 5e3 ** (-torch.arange(0, 32, 2) / 32)
        found["rope_freqs.weight"] = inverse / model.model.rotary_emb.inv_freq
    return found


def test_keys_and_every_number(stock, kinds, tmp_path):
    for number, kind in enumerate(kinds):
        directory, model = stock(kind, folder=str(number))
        keys, tensors, formats = contents(
            export_gguf(directory, tmp_path / f"{number}.gguf", "f32")
        )
        expected = expected_tensors(model)
        if "no shared" in kind:
            zeros = {name for name in tensors if "_shexp." in name}
            assert len(zeros) == 3 * model.config.num_hidden_layers
            assert not any(tensors.pop(name).any() for name in zeros)
        assert tensors.keys() == expected.keys(), kind
        assert set(formats.values()) == {"F32"}
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
        start = f"{keys['general.architecture']}."
        assert keys[f"{start}block_count"] == 2
        assert keys[f"{start}embedding_length"] == 64
        head = model.config.get_text_config().head_dim if "head_dim" in kinds[kind] else 16
        assert keys[f"{start}attention.key_length"] == head
        assert keys[f"{start}rope.dimension_count"] == (head // 2 if "half" in kind else head)
        assert len(keys["tokenizer.ggml.tokens"]) == keys[f"{start}vocab_size"] == 304


def test_keys_of_a_mixture(stock, tmp_path):
    directory, _ = stock("glm4_moe, two shared experts")
    keys, _, _ = contents(export_gguf(directory, tmp_path / "model.gguf", "f16"))
    own = {name.removeprefix("glm4moe."): value for name, value in keys.items()}
    assert (own["expert_count"], own["expert_used_count"]) == (4, 2)
    assert own["expert_feed_forward_length"] == 32
    assert own["expert_shared_count"] == 2
    assert own["expert_gating_func"] == 2
    assert own["expert_weights_scale"] == 1.5
    assert own["expert_weights_norm"] is False
    assert own["general.file_type"] == 1


def test_the_vocabulary(stock, tmp_path):
    directory, _ = stock("llama")
    raw = json.loads((directory / "tokenizer.json").read_text())
    keys, _, _ = contents(export_gguf(directory, tmp_path / "model.gguf"))
    tokens = keys["tokenizer.ggml.tokens"]
    vocabulary = raw["model"]["vocab"]
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    assert tokens[len(vocabulary) :] == [f"[PAD{n}]" for n in range(len(vocabulary), 304)]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.eos_token_id"] == 0
    assert keys["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_the_vocabulary_of_sentencepiece(stock, pieces, tmp_path):
    directory, _ = stock("llama", tokenizer=pieces, vocab_size=520)
    keys, _, _ = contents(export_gguf(directory, tmp_path / "model.gguf"))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.ggml.tokens"][:3] == ["<unk>", "</s>", "<0x00>"]
    assert keys["tokenizer.ggml.token_type"][:3] == [2, 3, 6]
    assert keys["tokenizer.ggml.scores"][-1] == -1000.0


@pytest.mark.parametrize(("dtype", "expected"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_vectors_and_routers_stay_in_f32(dtype, expected, stock, tmp_path, capsys):
    directory, model = stock("glm4_moe", moe_intermediate_size=40)
    _, tensors, formats = contents(export_gguf(directory, tmp_path / "model.gguf", dtype))
    exact = {name for name, tensor in tensors.items() if tensor.ndim == 1 or "gate_inp" in name}
    odd = {name for name in formats if "ffn_down_" in name}  # rows of 40
    for name, kind in formats.items():
        want = "F32" if name in exact else "F16" if name in odd else expected
        assert kind == want, name
    said = "f16: 4 tensors, as blocks of 32 do not divide their rows: blk.0.ffn_down_"
    assert (said in capsys.readouterr().out) == (dtype == "q8_0")
    for name, tensor in expected_tensors(model).items():
        if formats[name] == "F32":
            assert torch.equal(tensors[name], tensor)
        elif formats[name] == "F16":
            assert torch.equal(tensors[name], tensor.half().float())
        else:
            blocks = tensor.reshape(-1, 32)
            step = blocks.abs().amax(-1, keepdim=True) / 127
            # Half a step, and the scale itself is rounded to F16.
            error = (tensors[name].reshape(-1, 32) - blocks).abs()
            assert (error <= 0.5 * step + 127 * step * 2**-11 + 1e-7).all()
            assert error.max() > 0


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_perplexity_is_of_the_weights_in_the_file(dtype, stock, tmp_path, capsys):
    directory, _ = stock("glm4_moe", moe_intermediate_size=40)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over lazy dogs " * 3)
    _, tensors, _ = contents(export_gguf(directory, tmp_path / "m.gguf", dtype, text=text))
    said = [line for line in capsys.readouterr().out.splitlines() if ": perplexity" in line]
    model = load_stock(directory)
    round_weights(model, dtype)
    expected = expected_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    found = measure_rounding(directory, load_tokenizer(directory), text.read_text(), dtype)
    assert found.before != found.after
    assert said == [
        f"{dtype}: perplexity {found.after:,.3f}, before rounding {found.before:,.3f}, {text}"
    ]


def test_nobody_measured_is_said_of_mixtures_in_q8_0_alone(stock, tmp_path, capsys):
    for number, (kind, dtype) in enumerate(
        [("glm4_moe", "q8_0"), ("glm4_moe", "f16"), ("llama", "q8_0")]
    ):
        directory, _ = stock(kind, folder=f"{number}")
        export_gguf(directory, tmp_path / f"{number}.gguf", dtype)
        said = "--text FILE measures it" in capsys.readouterr().out
        assert said == (number == 0)


def test_models_that_are_saved_as_they_are_in_memory(stock, tmp_path):
    directory, model = stock("mixtral")
    first, before, _ = contents(export_gguf(directory, tmp_path / "one.gguf", "f32"))
    model.save_pretrained(directory, save_original_format=False)
    second, after, _ = contents(export_gguf(directory, tmp_path / "two.gguf", "f32"))
    assert first.keys() == second.keys()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
