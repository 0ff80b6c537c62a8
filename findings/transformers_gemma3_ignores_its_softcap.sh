#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Gemma 3 never reads `attn_logit_softcapping`.
#
# The configuration has the field, documents it, saves and loads it, and `eager_attention_forward` of
# the same file takes a cap; but no layer passes it on. In Gemma 2 the field caps the scores. A model
# trained elsewhere with a cap loads without a word and attends more sharply than it was trained to.
# Seen: with the same weights, Gemma 2's logits move with a cap of 0.1, and Gemma 3's do not by a bit.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

ids, moved = torch.arange(12)[None], {}
for config, model in ((Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)):
    logits = []
    for cap in (None, 0.1):
        torch.manual_seed(0)
        made = model(config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, initializer_range=0.5,
            attn_logit_softcapping=cap, final_logit_softcapping=None,
            attn_implementation="eager",
        )).eval()
        assert made.config.attn_logit_softcapping == cap
        with torch.no_grad():
            logits.append(made(input_ids=ids).logits)
    moved[config.model_type] = float((logits[0] - logits[1]).abs().max())
print("largest difference of logits, without a cap and with one:", moved)
raise SystemExit(0 if moved["gemma2"] > 1e-2 and moved["gemma3_text"] == 0 else 1)
PYTHON
