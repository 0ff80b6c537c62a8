#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a model whose experts are not marked by the decorator
# `use_experts_implementation` accepts any registered name, reports it, and never calls it.
#
# `from_pretrained(..., experts_implementation=...)` and `from_config` write the name into the
# configuration whether or not the architecture reads it; only names that are not registered are
# refused. Of the mixtures, Llama 4, DBRX, JetMoE, LongCat-Flash, Step-3.7, NLLB-MoE, Switch
# Transformers and Doge do not read it. `set_experts_implementation` looks for the decorator, and
# returns without a word: afterwards the model still reports the name that it was built with.
# Seen: Llama 4 reports "counted" and then still "counted" after "eager" was set; no call is counted.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Llama4TextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

calls = []
ALL_EXPERTS_FUNCTIONS.register("counted", lambda *arguments: calls.append(arguments))
config = Llama4TextConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, intermediate_size_mlp=16,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    num_local_experts=2, num_experts_per_tok=1, moe_layers=[0, 1],
)
model = AutoModelForCausalLM.from_config(config, experts_implementation="counted")
model(input_ids=torch.arange(5)[None])
built = model.get_experts_implementation()[""]
model.set_experts_implementation("eager")
after = model.get_experts_implementation()[""]
print(f"reported: {built}, then {after}; calls: {len(calls)}")
raise SystemExit(0 if (built, after, calls) == ("counted", "counted", []) else 1)
PYTHON
