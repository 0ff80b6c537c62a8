"""llama.cpp as a contender: a Llama or a carved one in a GGUF file, and greedy replies."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.bench.case import Package
from moezoo_train.bench.models import Architecture

PACKAGES = (
    Package("xllamacpp", "pip install xllamacpp gguf"),
    Package("gguf", "pip install xllamacpp gguf"),
)

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_BIAS = "mlp.gate.e_score_correction_bias"
_SIGMOID = 2  # llama.cpp's number of routers whose scores are sigmoids


def write(
    path: Path,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    kind: str = "F32",
    active: int = 0,
) -> None:
    """Write a Llama's weights, with a vocabulary of made-up words.

    Args:
        path: of the GGUF file.
        architecture: what the weights are of.
        weights: by transformers' names.
        kind: ``F32``, or ``Q8_0`` for matrices in blocks of 32 eight-bit numbers with a scale.
        active: experts per token, whose weights are nearly one, of blocks that GLM-4.5's mixture
            holds; 0: blocks are dense.
    """
    gguf: Any = importlib.import_module("gguf")
    heads = architecture.heads
    kv_heads = architecture.kv_heads or heads
    writer = gguf.GGUFWriter(path, "glm4moe" if active else "llama")
    quantized = gguf.GGMLQuantizationType[kind]
    writer.add_file_type(int(gguf.LlamaFileType[{"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0"}[kind]]))
    writer.add_block_count(architecture.layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(architecture.width)
    if active:
        _add_mixture(writer, weights, active)
    else:
        writer.add_feed_forward_length(weights["model.layers.0.mlp.up_proj.weight"].shape[0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(architecture.width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>" for token in range(architecture.vocabulary)])
    writer.add_token_scores([0.0] * architecture.vocabulary)
    writer.add_token_types([1] * architecture.vocabulary)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, tensor in weights.items():
        stored = tensor.float()
        if ".q_proj." in name and not active:
            stored = _paired(stored, heads)
        elif ".k_proj." in name and not active:
            stored = _paired(stored, kv_heads)
        if name != "lm_head.weight" or not architecture.tied:
            numbers = stored.contiguous().numpy()
            if numbers.ndim > 1 and kind != "F32":
                numbers = gguf.quantize(numbers, quantized)
                writer.add_tensor(_renamed(name, active), numbers, raw_dtype=quantized)
            else:
                writer.add_tensor(_renamed(name, active), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a head as llama.cpp turns them: each beside that half a head below it."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _renamed(name: str, active: int) -> str:
    part = name.removesuffix(".weight")
    if part in _NAMES:
        return f"{_NAMES[part]}.weight"
    number, _, rest = part.removeprefix("model.layers.").partition(".")
    if rest == _BIAS:
        return f"blk.{number}.exp_probs_b.bias"
    found = _BLOCK_NAMES[rest]
    if active and found == "ffn_norm":
        found = "post_attention_norm"
    return f"blk.{number}.{found}.weight"


def _add_mixture(writer: Any, weights: Mapping[str, Tensor], active: int) -> None:
    """Write the sizes of a mixture whose chosen experts weigh the same, one each."""
    experts, hidden, _ = weights["model.layers.0.mlp.experts.up_proj"].shape
    shared = weights["model.layers.0.mlp.shared_experts.up_proj.weight"].shape[0]
    writer.add_feed_forward_length(experts * hidden + shared)
    writer.add_expert_feed_forward_length(hidden)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(active)
    writer.add_expert_shared_count(shared // hidden)
    writer.add_leading_dense_block_count(0)
    writer.add_uint32("glm4moe.expert_gating_func", _SIGMOID)
    writer.add_expert_weights_scale(float(active))
    writer.add_expert_weights_norm(True)


class LlamaCpp:
    """A model in llama.cpp's server, which runs in this process, on as many threads as torch.

    Args:
        architecture: of the model.
        weights: by transformers' names.
        room: tokens of the longest text.
        kind: of the matrices, as of :func:`write`.
        active: as there.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        room: int,
        kind: str = "F32",
        active: int = 0,
    ) -> None:
        llama: Any = importlib.import_module("xllamacpp")
        parameters = llama.CommonParams()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write(file, architecture, weights, kind, active)
            parameters.model.path = str(file)
            parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = room, 1, 0
            parameters.cpuparams.n_threads = torch.get_num_threads()
            parameters.cpuparams_batch.n_threads = torch.get_num_threads()
            parameters.verbosity = -1
            self._server = llama.Server(parameters)  # maps the file

    def reply(self, ids: Sequence[int], new: int) -> list[int]:
        """Return the next ``new`` tokens, the likeliest each time."""
        request = {
            "prompt": list(ids),
            "n_predict": new,
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        written = self._server.handle_completions(request)["choices"][0]["text"]
        return [int(token) for token in re.findall(r"<(\d+)>", written)]
