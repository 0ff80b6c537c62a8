#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0: a run whose loss is NaN logs a loss of 0.
#
# `logging_nan_inf_filter` is on by default and replaces a step's loss that is not finite by the mean of
# the steps since the last line. The weights are updated all the same. Once they are NaN, so is every
# loss, that mean is 0, and the curve says that the model has learned everything.
# Seen: losses 4.16, 0, 0, 0, …, no weight of the last matrix finite. Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (64, 17))]
arguments = TrainingArguments(
    "out", max_steps=10, logging_steps=2, per_device_train_batch_size=4, learning_rate=1e30,
    warmup_steps=5, max_grad_norm=0.0, use_cpu=True, report_to=[], disable_tqdm=True,
    save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print("logged:", losses, "weights finite:", bool(model.lm_head.weight.isfinite().any()))
raise SystemExit(0 if losses[-1] == 0 and not model.lm_head.weight.isfinite().any() else 1)
PYTHON
