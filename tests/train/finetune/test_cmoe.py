"""CMoE's own parameters in a carved directory: the scale u and the balance bias b."""

import pytest
import torch

from moezoo import CarvedMoE
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.checkpoints.stock import predict
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def carved(model) -> list[CarvedMoE]:
    return [layer for layer in model.modules() if isinstance(layer, CarvedMoE)]


def test_one_step_trains_u_and_moves_b_against_the_load(
    directory, make_trainer, random_tokens, tmp_path
):
    module = LanguageModel(
        300,
        initialize_from=str(directory("carved")),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig("constant", warmup_steps=0),
    )
    layers = carved(module.model)
    assert len(layers) == 2
    assert all(not layer.u.any() and not layer.gate.selection_bias.any() for layer in layers)
    batch = next(iter(random_tokens.train_dataloader()))
    with torch.no_grad():
        stats = predict(module.model, batch["input_ids"], batch["labels"]).ffn_stats
    make_trainer(max_steps=1).fit(module, random_tokens)
    for layer, before in zip(layers, stats, strict=True):
        assert layer.u.abs().min() > 0
        counts = before["expert_counts"].float()
        expected = -1e-3 * torch.sign(counts - counts.mean())
        assert expected.any()
        torch.testing.assert_close(layer.gate.selection_bias, expected)

    module.save(tmp_path / "model", None)
    loaded, _ = load_checkpoint(tmp_path / "model")
    for layer, other in zip(layers, carved(loaded), strict=True):
        assert torch.equal(layer.u, other.u)
        assert torch.equal(layer.gate.selection_bias, other.gate.selection_bias)
        assert other.gate.selection_bias.dtype == torch.float32
    with torch.no_grad():
        one, other = (m.eval()(batch["input_ids"]).logits for m in (module.model, loaded))
    assert torch.equal(one, other)
