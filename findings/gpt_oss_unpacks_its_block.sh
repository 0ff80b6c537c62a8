#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: GPT-OSS unpacks what its feed-forward block returns, so a block
# that returns one tensor works at a batch of two, and mixes the two rows.
#
# Llama, Mistral, Qwen and most others add `self.mlp(x)` to the residual. GPT-OSS's decoder layer
# expects (hidden states, router scores). Who replaces `mlp` by a module that returns hidden states of
# shape (batch, tokens, width), as for the others, sees a batch of 1 or 3 raise "values to unpack".
# At a batch of 2 the first row is taken for the hidden states and broadcast to both, without a word:
# row 1's logits then change when only row 0's tokens do.
# Seen: unpack errors at batches 1 and 3; a difference of 0.3 at batch 2. Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import GptOssConfig, GptOssForCausalLM

torch.manual_seed(0)
config = GptOssConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=2,
    num_experts_per_tok=1, layer_types=["full_attention"],
)
model = GptOssForCausalLM(config).eval()
model.model.layers[0].mlp = torch.nn.Linear(16, 16)
tokens = torch.randint(32, (2, 5))
changed = tokens.clone()
changed[0] = (changed[0] + 1) % 32  # row 0 only
with torch.no_grad():
    moved = (model(tokens).logits[1] - model(changed).logits[1]).abs().max().item()
    errors = []
    for batch in (1, 3):
        try:
            model(tokens[:1].repeat(batch, 1))
        except ValueError as error:
            errors.append(str(error))
print(f"row 1 moves by {moved:.2f} when row 0's tokens change")
print("batches of 1 and 3:", errors)
assert moved > 0.1 and len(errors) == 2, "the behaviour has changed"
PYTHON
