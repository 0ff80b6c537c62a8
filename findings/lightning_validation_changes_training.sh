#!/usr/bin/env bash
# Lightning 2.6.6, torch 2.13.0: what a training step draws at random depends on when it is validated,
# and a resumed run draws what the beginning drew.
#
# An iterator over a DataLoader takes a seed for its workers from torch's global generator, also
# without shuffling and without workers. So a validation in the middle of an epoch moves the generator
# that dropout uses. A checkpoint holds no generator: whoever seeds as before and resumes gets the
# masks of the first steps once more, and the run is not the uninterrupted one.
# Seen: of eight steps the last four draw otherwise where it is validated after four; resumed after
# four, they draw what the first four drew. Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Noisy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.drawn = torch.nn.Parameter(torch.zeros(4)), []

    def training_step(self, batch, index):
        mask = torch.rand(4)
        self.drawn.append(round(mask.sum().item(), 4))
        return (self.weight * mask).sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(steps, validate_every=None, checkpoint=None, save=None):
    """Return what each step drew."""
    pl.seed_everything(0, verbose=False)
    module = Noisy()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=validate_every or 1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=1)
    trainer.fit(
        module, data, data if validate_every else None, ckpt_path=checkpoint,
        weights_only=True if checkpoint else None,
    )
    if save:
        trainer.save_checkpoint(save)
    return module.drawn


whole, validated = fit(8), fit(8, validate_every=4)
fit(4, save="half.ckpt")
resumed = fit(8, checkpoint="half.ckpt")
print("not validated:", whole, "validated after four:", validated, "resumed:", resumed, sep="\n")
same = validated[:4] == whole[:4] and resumed == whole[:4]
raise SystemExit(0 if same and validated[4:] != whole[4:] else 1)
PYTHON
