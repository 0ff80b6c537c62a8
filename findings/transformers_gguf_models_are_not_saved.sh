#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0: a model that was loaded from a GGUF file cannot be saved.
#
# from_pretrained(gguf_file=...) dequantizes all tensors, and its weights are ordinary fp32 ones, which
# can be trained. save_pretrained then says that the model is quantized: the mark of the file's format
# stays on it. Who fine-tunes such a model learns of it after the training.
# Seen: parameters in fp32, and a ValueError. Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import gguf
import numpy as np
from transformers import LlamaForCausalLM

width, heads, hidden, words = 32, 2, 48, 64
generator = np.random.default_rng(0)


def drawn(*shape):
    return generator.standard_normal(shape).astype(np.float32)


writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(128)
writer.add_embedding_length(width)
writer.add_feed_forward_length(hidden)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(10000.0)
writer.add_rope_dimension_count(width // heads)
writer.add_vocab_size(words)
for name in ("token_embd", "output"):
    writer.add_tensor(f"{name}.weight", drawn(words, width))
for name, shape in {
    "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
    "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
    "ffn_down": (width, hidden),
}.items():
    writer.add_tensor(f"blk.0.{name}.weight", drawn(*shape))
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = LlamaForCausalLM.from_pretrained(".", gguf_file="model.gguf")
print("parameters in", {str(parameter.dtype) for parameter in model.parameters()})
said = ""
try:
    model.save_pretrained("saved")
except ValueError as error:
    said = str(error)
print("save_pretrained:", said[:70] or "saved")
raise SystemExit(0 if "not serializable" in said else 1)
PYTHON
