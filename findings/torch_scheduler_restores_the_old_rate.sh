#!/usr/bin/env bash
# torch 2.13.0: resumed under another schedule, the first step is taken at the old schedule's rate.
#
# The optimizer's state dict holds the learning rate of its groups, and a scheduler's load_state_dict
# restores its counter without computing a rate. So a run that was trained with a linear decay over 10
# steps, stopped after 5 and resumed with a decay over 100 takes step 6 at 0.5, the old schedule's rate;
# the new one says 0.95. From step 7 on the rates are the new schedule's.
# Seen: 0.5, then 0.94. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch


def build(total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)


optimizer, scheduler = build(10)
for _ in range(5):
    optimizer.step()
    scheduler.step()
resumed, longer = build(100)
resumed.load_state_dict(optimizer.state_dict())
longer.load_state_dict(scheduler.state_dict())
rates = []
for _ in range(2):
    rates.append(round(resumed.param_groups[0]["lr"], 6))
    resumed.step()
    longer.step()
print("rates of steps 6 and 7:", rates, "where the schedule says [0.95, 0.94]")
assert rates == [0.5, 0.94], "the behaviour has changed"
PYTHON
