"""Tables with sparse gradients train beside the rest, and clip groups are clipped apart."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, strategy
from torch import nn

from moezoo import PEER, DenseFFN, Engram, FeedForward, InputError, MemoryPlus, ParameterGroup
from moezoo import ProductKeyMemory as PKM
from moezoo_train.optim.clipping import (
    clip_norms,
    clip_values,
    gradient_norms,
    grouped_gradients,
    total_norm,
)
from moezoo_train.optim.optimizer import CombinedOptimizer, OptimizerConfig, build_optimizer
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.parallel.fit_strategy import check_sparse_gradients
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.run.module import FFNRule, LanguageModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

SIZES = {"num_heads": 2, "top_k": 2, "query_norm": "layer"}
LAYERS = {
    "memory": partial(PKM, num_keys=16, **SIZES),
    "memory_plus": partial(MemoryPlus, num_keys=16, value_pool="m", **SIZES),
    "peer": partial(PEER, num_experts=256, gated=True, **SIZES),
    "engram": partial(Engram, num_heads=2, num_rows=100, table_lr_multiplier=1.0),
}


@pytest.fixture
def make(make_model):
    """Return a function that builds a model of a layer of :data:`LAYERS`."""

    def build(layer: str = "memory", sparse: bool = True, **arguments) -> LanguageModel:
        return make_model(ffn=partial(LAYERS[layer], sparse=sparse), **arguments)

    return build


def tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that layers want to have sparse gradients."""
    wanted = {
        parameter
        for layer in model.modules()
        if isinstance(layer, FeedForward)
        for group in layer.parameter_groups()
        for parameter in group.parameters
        if group.sparse
    }
    return {name: p for name, p in model.named_parameters() if p in wanted}


class Watch(pl.Callback):
    """Keeps the parameters before each step and the rows that have a gradient."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.rows: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.before.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.rows.append(
            {n: p.grad.coalesce().indices()[0].clone() for n, p in tables(module).items()}
        )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_leaves_rows_without_gradient_bit_unchanged(
    layer, name, make, make_trainer, random_tokens
):
    """Also once there is momentum, with weight decay, clipping and accumulation."""
    model = make(layer, optimizer=OptimizerConfig(name=name, lr=1e-2, weight_decay=0.5))
    watch = Watch()
    make_trainer(
        max_steps=3, accumulate_grad_batches=2, gradient_clip_val=0.1, callbacks=[watch]
    ).fit(model, random_tokens)
    watch.before.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert len(watch.rows) == 3
    left_alone_later = 0
    for step, rows_of in enumerate(watch.rows):
        for table, rows in rows_of.items():
            old, new = watch.before[step][table], watch.before[step + 1][table]
            changed = (old != new).any(dim=1)
            read = torch.zeros_like(changed).index_fill_(0, rows, True)
            assert not (changed & ~read).any()
            assert changed.any()
            earlier = torch.cat([r[table] for r in watch.rows[:step]]) if step else rows[:0]
            left_alone_later += int((~read).index_select(0, earlier).sum())
    assert left_alone_later  # rows that had momentum stayed too
    assert watch.before[0].keys() > watch.rows[0].keys() != set()
    rest = set(watch.before[0]) - set(watch.rows[0])
    assert all((watch.before[0][n] != watch.before[3][n]).any() for n in rest if "weight" in n)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_step_is_that_of_dense_gradients(layer, make, make_trainer, random_tokens):
    """Adam and SparseAdam differ by momentum of rows that are not read, so not at first."""
    # SparseAdam adds eps before it corrects the bias, so it is to be negligible.
    config = OptimizerConfig(lr=1e-2, eps=1e-18)
    models = [make(layer, sparse, optimizer=config) for sparse in (True, False)]
    logged = []
    for model in models:
        trainer = make_trainer(max_steps=1, accumulate_grad_batches=2, gradient_clip_val=0.1)
        trainer.fit(model, random_tokens)
        logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    for (name, parameter), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6, msg=name)
    for key in ("train/loss", "train/grad_norm"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-5)


@pytest.mark.parametrize(("layer", "name"), [("memory_plus", "muon"), ("peer", "adamw")])
def test_resumed_run_equals_uninterrupted_run(
    layer, name, make, make_trainer, random_tokens, tmp_path
):
    """Five steps of two batches against two and three more: parameters, moments, losses."""
    config = OptimizerConfig(name=name, lr=1e-2)
    losses: list[list[float]] = [[], [], []]

    def fit(run: int, steps: int, resume: str | None = None):
        model = make(layer, optimizer=config, schedule=ScheduleConfig("constant", warmup_steps=3))
        keep = pl.callbacks.LambdaCallback(
            on_train_batch_end=lambda trainer, module, outputs, *_: losses[run].append(
                float(outputs["loss"])
            )
        )
        trainer = make_trainer(
            max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[keep]
        )
        # Every batch is the same, so that the position in the data does not matter here.
        random_tokens.windows = 4
        trainer.fit(model, random_tokens, ckpt_path=resume)
        return trainer, model

    whole, model = fit(0, 5)
    first, _ = fit(1, 2)
    first.save_checkpoint(tmp_path / "part.ckpt")
    resumed, again = fit(2, 5, str(tmp_path / "part.ckpt"))
    assert losses[1] + losses[2] == losses[0]
    for (key, tensor), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), key
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for field, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][field]))


def test_an_offloaded_table_is_trained_and_resumed_as_a_resident_one(
    make_model, make_trainer, random_tokens, tmp_path, monkeypatch
):
    """To the bit, also where a run goes on with its table elsewhere."""
    monkeypatch.setattr(strategy, "_optimizer_to_device", None)  # nothing moves the moments
    random_tokens.windows = 4

    def fit(offload: bool, steps: int, resume=None):
        memory = {"layers": "all", "class_path": "moezoo.Engram"}
        memory["init_args"] = {"num_heads": 2, "num_rows": 90, "sparse": True, "offload": offload}
        model = make_model(memory=memory, activation_checkpointing=not offload)
        trainer = make_trainer(max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=0.5)
        trainer.fit(model, random_tokens, ckpt_path=resume)
        return trainer, model

    whole, model = fit(offload=False, steps=4)
    part, _ = fit(offload=True, steps=2)
    part.save_checkpoint(tmp_path / "part.ckpt")
    for offload in (True, False):
        if not offload:
            monkeypatch.undo()
        resumed, again = fit(offload, 4, str(tmp_path / "part.ckpt"))
        tensors = again.state_dict()
        assert tensors.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensors[key]), key
        states = [trainer.optimizers[0].state_dict()["state"] for trainer in (whole, resumed)]
        for number, state in states[0].items():
            for field, value in state.items():
                other = torch.as_tensor(states[1][number][field])
                assert torch.equal(torch.as_tensor(value), other), field


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_a_gpu_the_table_and_its_moments_stay_in_main_memory(
    precision, make_model, make_trainer, random_tokens, tmp_path
):
    def fit(offload: bool, steps: int, resume=None):
        memory = {"layers": "all", "class_path": "moezoo.Engram"}
        memory["init_args"] = {"num_heads": 2, "num_rows": 90, "sparse": True, "offload": offload}
        model, seen = make_model(memory=memory), set()

        def look(trainer, module, *_) -> None:
            state = trainer.optimizers[0].state
            for table in tables(module).values():
                seen.add(table.device.type)
                seen.update(t.device.type for t in state[table].values() if torch.is_tensor(t))

        watch = pl.callbacks.LambdaCallback(on_train_batch_end=look)
        trainer = make_trainer(
            accelerator="gpu", max_steps=steps, precision=precision, gradient_clip_val=0.5,
            callbacks=[watch],
        )  # fmt: skip
        trainer.fit(model, random_tokens, ckpt_path=resume)
        assert seen == {"cpu" if offload else "cuda"}
        return trainer, model

    part, _ = fit(offload=True, steps=2)
    part.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = fit(True, 4, str(tmp_path / "part.ckpt"))
    _, resident = fit(False, 4, str(tmp_path / "part.ckpt"))
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    for name, tensor in resident.state_dict().items():
        found = resumed.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_tables_keep_a_constant_rate_without_decay(make):
    model = make("memory", optimizer=OptimizerConfig(name="muon", lr=1e-3, weight_decay=0.5))
    optimizer = build_optimizer(model.model, model.optimizer_config)
    assert isinstance(optimizer, CombinedOptimizer)
    sparse = [g for g in optimizer.param_groups if g["algorithm"] == "sparse_adam"]
    assert set(sparse[0]["params"]) == set(tables(model).values())
    assert [(g["lr"], g["schedule"], g.get("weight_decay")) for g in sparse] == [
        (4e-3, False, None)
    ]


def test_checkpointing_and_bf16_train_sparse_tables(make, make_trainer, random_tokens):
    plain, recomputed = make("peer"), make("peer", activation_checkpointing=True)
    for model in (plain, recomputed):
        make_trainer(max_steps=2).fit(model, random_tokens)
    for (name, tensor), other in zip(
        plain.state_dict().items(), recomputed.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    model = make("memory")
    before = {n: p.detach().clone() for n, p in tables(model).items()}
    make_trainer(max_steps=2, precision="bf16-mixed").fit(model, random_tokens)
    assert all((p != before[n]).any() for n, p in tables(model).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": True}, r"model\.compile: torch\.compile has no sparse gradients"),
        (
            {"optimizer": OptimizerConfig(lr=0.0)},
            r"optimizer\.lr: SparseAdam wants more than 0",
        ),
        ({"optimizer": OptimizerConfig(eps=0.0)}, r"optimizer\.eps: SparseAdam wants more"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments, message, make, make_trainer, random_tokens, monkeypatch
):
    model = make("memory", **arguments)
    monkeypatch.setattr(model.model, "compile", lambda: None)
    with pytest.raises(InputError, match=message) as error:
        make_trainer(max_steps=1).fit(model, random_tokens)
    assert "\n" not in str(error.value)


def test_only_strategies_that_sum_them_have_sparse_gradients(make_trainer):
    for known in (make_trainer().strategy, DDPStrategy(), FSDP2Strategy()):
        check_sparse_gradients(known, compiled=False)
    with pytest.raises(InputError, match=r"trainer\.strategy: it has no sparse gradients"):
        check_sparse_gradients(ModelParallelStrategy(), compiled=False)


class Decayed(DenseFFN):
    """A layer that wants what cannot be."""

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("rows", list(self.parameters()), sparse=True)]


def test_decay_of_sparse_rows_is_refused():
    with pytest.raises(InputError, match=r"weight_decay: it would move every row of .* 'rows'"):
        build_optimizer(Decayed(8), OptimizerConfig())
    assert build_optimizer(Decayed(8), OptimizerConfig(weight_decay=0.0)).param_groups


# Clipping


@pytest.fixture
def clipped():
    """Return an optimizer over a dense and a sparse parameter in two groups, and one apart."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(6, 3)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {"params": weights[:1], "clip_group": "main"},
            {"params": weights[1:2]},  # a checkpoint of before there were groups
            {"params": weights[2:], "clip_group": "values"},
        ],
        lr=1.0,
    )
    weights[0].grad = torch.randn(6, 3, generator=generator)
    for weight, rows in ((weights[1], [4, 1, 4]), (weights[2], [0, 0, 5])):
        values = torch.randn(3, 3, generator=generator)
        weight.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), values, (6, 3), check_invariants=True
        )
    return optimizer, weights, [w.grad.to_dense().clone() for w in weights]


def test_norms_are_those_of_the_dense_gradients(clipped):
    optimizer, _, dense = clipped
    norms = gradient_norms(grouped_gradients(optimizer))
    assert list(norms) == ["main", "values"]
    torch.testing.assert_close(norms["main"], torch.stack(dense[:2]).norm())
    torch.testing.assert_close(norms["values"], dense[2].norm())
    torch.testing.assert_close(total_norm(norms), torch.stack(dense).norm())
    assert torch.equal(total_norm({"main": norms["main"]}), norms["main"])


@pytest.mark.parametrize("limit", [0.5, 2.5, 100.0])
def test_groups_are_clipped_apart(clipped, limit):
    optimizer, weights, dense = clipped
    twins = [nn.Parameter(torch.zeros(6, 3)) for _ in dense]
    for twin, gradient in zip(twins, dense, strict=True):
        twin.grad = gradient
    gradients = grouped_gradients(optimizer)
    clip_norms(gradients, gradient_norms(gradients), limit)
    torch.nn.utils.clip_grad_norm_(twins[:2], limit)
    torch.nn.utils.clip_grad_norm_(twins[2:], limit)
    for weight, twin in zip(weights, twins, strict=True):
        torch.testing.assert_close(weight.grad.to_dense(), twin.grad, rtol=1e-6, atol=1e-7)
    assert weights[1].grad.is_sparse


def test_numbers_are_clamped_in_sparse_gradients_too(clipped):
    optimizer, weights, dense = clipped
    clip_values(grouped_gradients(optimizer), 0.3)
    for weight, gradient in zip(weights, dense, strict=True):
        torch.testing.assert_close(weight.grad.to_dense(), gradient.clamp(-0.3, 0.3))


@pytest.mark.parametrize("apart", [True, False])
def test_values_are_clipped_apart_in_training(apart, make_model, make_trainer, random_tokens):
    """Each group's clipped norm is the limit; the logged norm is that of the whole gradient."""
    memory = partial(MemoryPlus, num_keys=16, clip_values_apart=apart, **SIZES)
    model = make_model(
        ffn_rules=[FFNRule([1], memory)], optimizer=OptimizerConfig(lr=1e-3, fused=False)
    )
    twin = copy.deepcopy(model.model)
    limit = 1e-3
    # Without a validation, which begins by clearing them, it leaves the clipped gradients.
    trainer = make_trainer(max_steps=1, gradient_clip_val=limit, limit_val_batches=0)
    trainer.fit(model, random_tokens)
    parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[name.endswith("values.weight")].append(parameter.grad)
    of_values, of_rest = (float(torch.nn.utils.get_total_norm(parts[k])) for k in (True, False))
    batch = next(iter(random_tokens.train_dataloader()))
    twin(batch["input_ids"], shift_labels=batch["labels"]).loss.backward()
    whole = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert logged["train/grad_norm"] == pytest.approx(float(whole), rel=1e-5)
    values = [p.grad for n, p in twin.named_parameters() if n.endswith("values.weight")]
    if apart:
        assert [of_values, of_rest] == pytest.approx([limit, limit], rel=1e-2)
        assert logged["train/grad_norm/values"] == pytest.approx(float(values[0].norm()), rel=1e-5)
    else:
        assert "train/grad_norm/values" not in logged
        assert (of_values**2 + of_rest**2) ** 0.5 == pytest.approx(limit, rel=1e-2)
