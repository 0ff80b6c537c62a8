#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a mixture whose file lacks all down projections of a layer loads,
# with random ones in their place.
#
# from_pretrained stacks the experts of a checkpoint. If one expert is missing the stack has another
# shape, and that is refused. If all of a kind are missing there is no stack: the parameter is counted as
# missing, filled by the initialization, and named in a report among the log's lines. Whoever converts a
# checkpoint and forgets a name gets a model that runs, and with residual connections even one that
# writes text.
# Seen: an error for one expert; for all of a kind a model whose other tensors are those of the file.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

model = MixtralForCausalLM(MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
))
model.save_pretrained("model")
whole = load_file("model/model.safetensors")


def load(left_out):
    kept = {name: tensor for name, tensor in whole.items() if left_out not in name}
    assert len(kept) < len(whole)
    save_file(kept, "model/model.safetensors", metadata={"format": "pt"})
    return MixtralForCausalLM.from_pretrained("model")


refused = ""
try:
    load("experts.3.")
except RuntimeError as error:
    refused = str(error)
experts, loaded = model.model.layers[0].mlp.experts, load(".w2.").model.layers[0].mlp.experts
same = {n: torch.equal(getattr(experts, n), getattr(loaded, n)) for n in ("gate_up_proj", "down_proj")}
print("without one expert:", refused[:70])
print("without all w2, as in the file:", same, f"deviation {float(loaded.down_proj.std()):.3f}")
raise SystemExit(0 if refused and same == {"gate_up_proj": True, "down_proj": False} else 1)
PYTHON
