#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: an NLLB-MoE block runs experts 0 and 1 only, however many it has.
#
# The router returns a mask of its first choices, (tokens, experts) of 0 and 1, and the block hands it
# to the experts as if it were expert numbers: `one_hot` makes of a 1 "expert 1", of a 0 "expert 0".
# Who compares a layer with it, or fine-tunes one, gets finite outputs of two experts of 128. The others
# get no gradient: a checkpoint loads and trains all the same, and nothing warns.
# Seen: the router's first choices are spread over 8 experts, and forward hooks fire on 0 and 1.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

torch.manual_seed(0)
config = NllbMoeConfig(d_model=16, num_experts=8, expert_capacity=64)
block = NllbMoeSparseMLP(config, ffn_dim=32).eval()
ran = set()
for name, expert in block.experts.items():
    expert.register_forward_hook(lambda module, inputs, output, name=name: ran.add(name))
hidden = torch.randn(2, 32, 16)
mask = block.router(hidden.reshape(-1, 16), None)[0]
chosen = sorted(set(mask.argmax(dim=-1).tolist()))
block(hidden)
print(f"first choices: experts {chosen}; experts that ran: {sorted(ran)}")
raise SystemExit(0 if len(chosen) == 8 and ran == {"expert_0", "expert_1"} else 1)
PYTHON
