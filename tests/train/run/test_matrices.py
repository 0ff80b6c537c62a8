"""Matrices that follow the run: what they are told, how a run resumes, what is refused."""

import shutil
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moezoo import DenseFFN, InputError, zoo
from moezoo.matrices import NM, BlockShuffle, LowRank, Pruned, Transposable
from moezoo_train.checkpoint.files import AtomicCheckpointIO
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.optim.schedule import RunSchedule, ScheduleConfig
from moezoo_train.parallel.zero import check_zero
from moezoo_train.run.callbacks import LastCheckpoint
from moezoo_train.run.module import FFNRule

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

RIGL = partial(DenseFFN, d_ff=24, matrices=Pruned(sparsity=0.5, growth=0.5, every=2))
FST = partial(DenseFFN, d_ff=24, matrices=Transposable(every=2, dense_from=0.8))
GUIDED = partial(DenseFFN, d_ff=24, matrices=LowRank(rank=4, guide=0.9))


class Told(DenseFFN):
    """Keeps what the trainer says of the run."""

    told: list[float | None]

    def step(self, progress=None) -> None:
        super().step(progress)
        self.told.append(progress)


@pytest.mark.parametrize("total", [None, 8])
def test_layers_are_told_the_share_of_the_run(make_model, make_trainer, random_tokens, total):
    schedule = ScheduleConfig("constant", warmup_steps=0, total_steps=total)
    model = make_model(ffn=GUIDED, schedule=schedule)
    layer = ffn_layers(model.model)[0]
    layer.__class__, layer.told = Told, []
    make_trainer(max_steps=4, accumulate_grad_batches=2).fit(model, random_tokens)
    assert layer.told == [(n + 1) / (total or 4) for n in range(4)]
    assert float(layer.up_proj.progress) == layer.told[-1]


def matrix_methods():
    return [m for m in zoo() if "matrices" in m.arguments]


class SameBatches(pl.LightningDataModule):
    """Batches that are all the same, so that it does not matter which ones a resumed run sees."""

    bytes_per_token = 3.0

    def train_dataloader(self) -> DataLoader:
        row = torch.arange(13) * 7 % 50
        return DataLoader([{"input_ids": row[:-1], "labels": row[1:]}] * 64, batch_size=4)

    val_dataloader = train_dataloader


class Keep(pl.Callback):
    """Keeps a copy of the checkpoint of one step."""

    def __init__(self, path, step) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step + 1 and not self.path.exists():
            shutil.copy(trainer.checkpoint_callback.last_model_path, self.path)


def test_a_resumed_run_has_the_same_masks_and_guides(make_model, make_trainer, tmp_path):
    copy = tmp_path / "step3.ckpt"

    def fit(resume=None):
        model = make_model(num_layers=3, ffn=RIGL, ffn_rules=[FFNRule(1, FST), FFNRule(2, GUIDED)])
        trainer = make_trainer(
            max_steps=6,
            gradient_clip_val=1.0,
            enable_checkpointing=True,
            limit_val_batches=0,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Keep(copy, 3), LastCheckpoint(tmp_path / "checkpoints", 3)],
        )
        trainer.fit(model, SameBatches(), ckpt_path=resume)
        return model

    begun = make_model(num_layers=3, ffn=RIGL).state_dict()
    whole = fit().state_dict()
    for name in (f"model.model.layers.0.mlp.{n}_proj.mask" for n in ("gate", "up", "down")):
        assert not torch.equal(whole[name], begun[name])
    resumed = fit(copy).state_dict()
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert whole["model.model.layers.1.mlp.up_proj.mask"].all()


def test_every_kind_resumes_bit_for_bit(make_model, make_trainer, tmp_path):
    """A block of each, schedules included, whatever it keeps beside its weights."""
    kinds = {method.name: method.arguments["matrices"] for method in matrix_methods()}
    kinds["factorized"] = {"kind": "factorized", "growth": 0.3, "every": 2}
    kinds["parallel"] = {"kind": "parallel", "growth": 0.3, "every": 2}
    kinds["doped"] = {"kind": "doped", "growth": 0.3, "every": 2}
    rules = [
        FFNRule(number, partial(DenseFFN, d_ff=32, matrices=matrices))
        for number, matrices in enumerate(kinds.values())
    ]
    copy = tmp_path / "step3.ckpt"

    def fit(resume=None):
        model = make_model(num_layers=len(rules), ffn_rules=rules)
        trainer = make_trainer(
            max_steps=6,
            enable_checkpointing=True,
            limit_val_batches=0,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Keep(copy, 3), LastCheckpoint(tmp_path / "checkpoints", 3)],
        )
        trainer.fit(model, SameBatches(), ckpt_path=resume)
        return model.state_dict()

    whole, resumed = fit(), fit(copy)
    assert len(kinds) == 16
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), (name, list(kinds))


def test_muon_takes_factors_and_masked_weights(make_model):
    rules = [FFNRule(1, partial(DenseFFN, bias=True, matrices=BlockShuffle(guide=0.5)))]
    model = make_model(ffn=RIGL, ffn_rules=rules).model
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = {
        names[p] for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]
    }
    for projection in ("gate_proj", "up_proj", "down_proj"):
        start = f"model.layers.1.mlp.{projection}"
        assert f"model.layers.0.mlp.{projection}.latent" in muon
        assert {f"{start}.first", f"{start}.second", f"{start}.guide"} <= muon
        assert f"{start}.bias" not in muon


def test_a_run_without_an_end_is_refused_before_it_begins(make_model):
    model = make_model(ffn=GUIDED).model
    optimizer = build_optimizer(model, OptimizerConfig())
    schedule = RunSchedule(ScheduleConfig("constant", warmup_steps=0))
    with pytest.raises(InputError, match=r"trainer.max_steps: the matrices of the model follow"):
        schedule.put_on(optimizer, None, model)
    assert schedule.progress(3) is None
    schedule.put_on(optimizer, 12, model)
    assert schedule.progress(3) == 0.25
    free = make_model(ffn=partial(DenseFFN, matrices=NM())).model
    RunSchedule(ScheduleConfig("constant")).put_on(optimizer, None, free)


def test_zero_is_refused_where_there_are_masks(make_model):
    with pytest.raises(InputError, match=r"trainer.strategy: ZeRO keeps weights where their masks"):
        check_zero("32-true", make_model(ffn=RIGL))
    check_zero("32-true", make_model(ffn=GUIDED))
