#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0: with gradient accumulation over N batches, the
# load-balancing loss of a mixture counts N times as much as without.
#
# Trainer hands a model the number of tokens of the whole step, by which it divides its cross-entropy;
# such a loss is not divided by N any more. Mixtral and its relatives then add
# `router_aux_loss_coef * aux_loss`, which is this batch's mean, in the forward pass of each of the N.
# So the same data at the same batch size per step is balanced N times as hard where memory is short.
# Seen: with eight equal rows a step, the router's gradient that is due to the auxiliary loss is 4.00
# times as large in four batches of two as in one of eight; that of the cross-entropy is the same.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments


def gradient(batches, coefficient):
    """Return the gradient of the first step for the router, of eight equal rows."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        router_aux_loss_coef=coefficient, output_router_logits=True,
    ))
    row, found = torch.randint(64, (17,)), []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments, **names):
            found.append(model.model.layers[0].mlp.gate.weight.grad.clone())

    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=8 // batches,
        gradient_accumulation_steps=batches, max_grad_norm=0.0, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )
    rows = [{"input_ids": row, "labels": row}] * 8
    Trainer(model, arguments, train_dataset=rows, callbacks=[Keep()]).train()
    return found[0]


one, four = (
    (gradient(batches, 1.0) - gradient(batches, 0.0)).norm().item() for batches in (1, 4)
)
print(f"of the auxiliary loss: {one:.4f} in one batch, {four:.4f} in four: {four / one:.2f} times")
raise SystemExit(0 if abs(four / one - 4) < 0.01 else 1)
PYTHON
