"""Tiny GGUF files, written from models of transformers by the gguf library, as llama.cpp's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def name_of(name: str, arch: str = "llama") -> str:
    """Return llama.cpp's name of a tensor."""
    names = NAMES | (GEMMA3_NAMES if arch == "gemma3" else {})
    stem, _, ending = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.{ending}"


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the two halves of each head in turns, the order in which llama.cpp rotates a llama."""
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def write_gguf(
    file: Path,
    model: Any,
    kind: str = "F32",
    arch: str | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokens: bool | str = "gpt-2",
    adds_bos: bool | None = None,
) -> Path:
    """Write a model; norms and biases stay in fp32.

    Args:
        file: where.
        model: a Llama, Qwen2, Qwen3 or Gemma 3 of transformers.
        kind: type of the matrices.
        arch: llama.cpp's name of the architecture; default: transformers'.
        keys: more keys of the architecture, by the names behind its own; None leaves one out.
        tensors: more tensors.
        tokens: name of the pre-tokenizer of a tokenizer of bytes; False for no tokenizer.
        adds_bos: whether texts begin with a token of their own; None leaves the key out.
    """
    import gguf

    config = model.config
    arch = arch or config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(file, arch)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": width,
        "vocab_size": config.vocab_size,
        **({"attention.sliding_window": config.sliding_window} if arch == "gemma3" else {}),
        **(keys or {}),
    }
    for name, value in fields.items():
        if isinstance(value, float):
            writer.add_float32(f"{arch}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{name}", value)
    if tokens:
        _add_tokenizer(writer, config.vocab_size, str(tokens))
        if adds_bos is not None:
            writer.add_add_bos_token(adds_bos)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        if arch == "gemma3" and "norm" in name:
            tensor = tensor + 1.0  # what it multiplies with
        numbers = tensor.float().numpy()
        if numbers.ndim > 1:
            raw = gguf.quantize(numbers, quantized)
            writer.add_tensor(name_of(name, arch), raw, raw_dtype=quantized)
        else:
            writer.add_tensor(name_of(name, arch), numbers)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, count: int, split: str) -> None:
    """Add one of bytes and three pairs; 0 begins texts, 1 ends them, the last stand for nothing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "he", "Ġ1", "ĠĠ"]
    tokens += [f"<unused{n}>" for n in range(count - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    kinds = [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "Ġ 1", "Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
