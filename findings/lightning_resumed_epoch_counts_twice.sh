#!/usr/bin/env bash
# Lightning 2.6.6, torch 2.13.0: a checkpoint saved after fit() stopped in mid-epoch counts that
# epoch as done, so that a run resumed from it with max_epochs sees fewer batches.
#
# Epochs of 4 batches. A run with max_steps=6 ends in the middle of its second epoch, and
# Trainer.save_checkpoint is called. Resumed with max_epochs=3, it trains to step 10; the run that was
# never interrupted trains to step 12. Resumed with max_steps=12 it does reach step 12, and its
# current_epoch is 4 where the other's is 3. A checkpoint saved at the end of an epoch (max_steps=8)
# resumes to 12 as it should.
# Seen: 12 uninterrupted; 10 from step 6; 12 from step 8. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


class Weight(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        return self.weight.sum() * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(checkpoint=None, save=None, **until):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **until,
    )
    data = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=1)
    trainer.fit(Weight(), data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    if save:
        trainer.save_checkpoint(save)
    return trainer.global_step, trainer.current_epoch


fit(max_steps=6, max_epochs=-1, save="6.ckpt")
fit(max_steps=8, max_epochs=-1, save="8.ckpt")
seen = {
    "uninterrupted, max_epochs=3": fit(max_epochs=3),
    "resumed at step 6, max_epochs=3": fit(checkpoint="6.ckpt", max_epochs=3),
    "resumed at step 8, max_epochs=3": fit(checkpoint="8.ckpt", max_epochs=3),
    "resumed at step 6, max_steps=12": fit(checkpoint="6.ckpt", max_steps=12, max_epochs=-1),
    "uninterrupted, max_steps=12": fit(max_steps=12, max_epochs=-1),
}
for run, (step, epoch) in seen.items():
    print(f"{run}: step {step}, current_epoch {epoch}")
assert list(seen.values()) == [(12, 3), (10, 3), (12, 3), (12, 4), (12, 3)], "it has changed"
PYTHON
