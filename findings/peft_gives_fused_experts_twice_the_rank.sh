#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: old names of a mixture's experts in LoRA's configuration
# ask for another rank than new ones, and names in its files do not say which weight they adapt.
#
# transformers 5 holds the experts of a layer as two parameters, gate_up_proj and down_proj, where files
# have w1, w2 and w3 of each expert. PEFT translates the old names, and doubles the rank of gate_up_proj,
# as two matrices were fused; by the new name it has the rank that is asked for. Adapters of two
# parameters of a module are one in the other: that of gate_up_proj is called `experts.base_layer`, that
# of down_proj `experts`, and where only one is adapted, that one is called `experts`.
# Seen: at r=2 and four experts, (experts × rank, width) of the adapters' A matrices as asserted below.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM


def adapters(**names):
    """Return the shapes of the A matrices, by the names of their modules in the block."""
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    ))
    adapted = get_peft_model(model, LoraConfig(r=2, **names))
    return {
        name.partition(".mlp.")[2].partition(".lora_A")[0]: tuple(parameter.shape)
        for name, parameter in adapted.named_parameters() if "lora_A" in name
    }


new = ["experts.gate_up_proj", "experts.down_proj"]
seen = [
    adapters(target_modules=["w1", "w2", "w3"]),
    adapters(target_modules=[], target_parameters=new),
    adapters(target_modules=[], target_parameters=new[:1]),
]
print("old names, new names, one new name:", *seen, sep="\n")
raise SystemExit(0 if seen == [
    {"experts.base_layer": (16, 32), "experts": (8, 48)},
    {"experts.base_layer": (8, 32), "experts": (8, 48)},
    {"experts": (8, 32)},
] else 1)
PYTHON
