#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: DeepSeek-V2's router never reads `norm_topk_prob`.
#
# The configuration has the field, saves and loads it, and the blocks of DeepSeek-V3, Qwen and OLMoE
# obey theirs. Here the weights are the raw softmax scores times `routed_scaling_factor`, whatever it
# says. The published V2 models have it off; a mixture that was trained elsewhere with it on loads
# without a word, and its experts are weighed too low.
# Seen: with the same weights and inputs, a token's weights sum to the same number below 1 for both.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

torch.manual_seed(0)
hidden, weight = torch.randn(1, 5, 32), torch.randn(8, 32) / 32**0.5
sums = []
for normalise in (False, True):
    config = DeepseekV2Config(
        hidden_size=32, n_routed_experts=8, num_experts_per_tok=2, topk_method="greedy",
        routed_scaling_factor=1.0, n_group=1, topk_group=1, norm_topk_prob=normalise,
    )
    router = DeepseekV2TopkRouter(config)
    router.weight.data.copy_(weight)
    found = [part for part in router(hidden) if part.shape[-1] == 2 and part.is_floating_point()]
    sums.append(found[0].sum(dim=-1).flatten())
print("sums of the weights, norm_topk_prob off and on:", sums[0].tolist(), sums[1].tolist())
raise SystemExit(0 if torch.equal(*sums) and (sums[0] < 0.999).any() else 1)
PYTHON
