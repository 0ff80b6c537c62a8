#!/usr/bin/env bash
# Lightning 2.6.6, torch 2.13.0: the last accumulation window of an epoch is divided by too much.
#
# With accumulate_grad_batches=N each loss is divided by N. An epoch whose number of batches is no
# multiple of N ends with a shorter window, and its optimizer step is taken all the same, so its
# gradient is the sum of fewer losses, still divided by N. Five batches whose gradient is 1 each,
# N = 4: the windows' gradients are 1 and 0.25, in every epoch. The second step weighs its batch a
# quarter as much as the first step weighs its four; a mean over the window would be 1.
# Seen: [1.0, 0.25, 1.0, 0.25]. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import logging
import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Weight(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.gradients = []

    def training_step(self, batch, index):
        return self.weight.sum() * batch[0].mean()  # the gradient is 1

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


module = Weight()
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=2, accumulate_grad_batches=4, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(torch.ones(5, 1)), batch_size=1))
print("gradients of the windows:", module.gradients)
assert module.gradients == [1.0, 0.25, 1.0, 0.25], "the behaviour has changed"
PYTHON
