#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0: rotary scaling of Llama 3.1 is lost in GGUF files.
#
# llama.cpp's converter writes it as a tensor, `rope_freqs.weight`: by what each frequency is divided.
# transformers has no place for the tensor, skips it, and reports neither it nor a missing scaling:
# the model that `from_pretrained(gguf_file=...)` returns turns its keys as Llama 3.0 does, which is
# right for short texts and wrong for long ones.
# Seen: frequencies halved in the file are not halved in the model, and nothing is said.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
cd "$folder"
venv/bin/python - 2>said.txt <<'PYTHON'
import gguf
import numpy as np
from transformers import LlamaForCausalLM

width, heads, layers, hidden, words = 32, 2, 1, 48, 64
generator = np.random.default_rng(0)


def drawn(*shape):
    return generator.standard_normal(shape).astype(np.float32)


writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(layers)
writer.add_context_length(131072)
writer.add_embedding_length(width)
writer.add_feed_forward_length(hidden)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(10000.0)
writer.add_rope_dimension_count(width // heads)
writer.add_vocab_size(words)
writer.add_tensor("rope_freqs.weight", np.full(width // heads // 2, 2.0, np.float32))
writer.add_tensor("token_embd.weight", drawn(words, width))
writer.add_tensor("output.weight", drawn(words, width))
writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
for name, shape in {
    "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
    "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
    "ffn_down": (width, hidden),
}.items():
    writer.add_tensor(f"blk.0.{name}.weight", drawn(*shape))
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", np.ones(width, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = LlamaForCausalLM.from_pretrained(".", gguf_file="model.gguf")
plain = 10000.0 ** (-np.arange(0, width // heads, 2) / (width // heads))
found = model.model.rotary_emb.inv_freq.numpy()
print("in the file, over Llama 3.0's:", 1 / 2.0, "- in the model:", (found / plain).round(4).tolist())
print("rope_parameters:", model.config.rope_parameters)
raise SystemExit(0 if np.allclose(found, plain) else 1)
PYTHON
if grep -qi "rope_freqs" said.txt; then
  echo "transformers now speaks of the tensor:"; grep -i "rope_freqs" said.txt; exit 1
fi
echo "nothing was said of rope_freqs"
