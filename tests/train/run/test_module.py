"""The training step: what is logged is what happened, and nothing bad is learned from a NaN."""

import copy
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moezoo import (
    PEER,
    DenseFFN,
    InputError,
    PersistentMemoryAttention,
    ProductKeyMemory,
    SparseMoE,
)
from moezoo.routing import RouterOptions
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_train.measure import throughput
from moezoo_train.measure.metrics import TrainingMetrics
from moezoo_train.measure.throughput import (
    count_parameters,
    ffn_layers,
    forward_flops_per_token,
    peak_flops,
)
from moezoo_train.optim.optimizer import OptimizerConfig
from moezoo_train.optim.schedule import ScheduleConfig
from moezoo_train.run.module import FFNRule, LanguageModel

# Lightning's own calls to torch's pytrees, and its advice on worker processes.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

PROBE_SECONDS = throughput.PROBE_SECONDS  # which tests/conftest.py sets to 0 for all other tests


class Recorder(pl.Callback):
    """Keeps the logged metrics of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer, *_) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, *_) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def training_metrics(trainer: pl.Trainer) -> TrainingMetrics:
    return next(c for c in trainer.callbacks if isinstance(c, TrainingMetrics))


def test_rules_choose_layers():
    model = LanguageModel(
        11,
        d_model=16,
        num_layers=4,
        num_heads=2,
        ffn=partial(DenseFFN, d_ff=24),
        ffn_rules=[
            FFNRule("every 2", partial(SparseMoE, num_experts=4)),
            FFNRule([3], partial(SparseMoE, num_experts=6)),
        ],
    )
    layers = ffn_layers(model.model)
    assert [type(layer).__name__ for layer in layers] == [
        "DenseFFN",
        "SparseMoE",
        "DenseFFN",
        "SparseMoE",
    ]
    assert [layers[1].num_experts, layers[3].num_experts, layers[0].d_ff] == [4, 6, 24]
    assert all("d_model" not in rule["init_args"] for rule in model.model.config.ffn)


def test_rules_say_what_routers_read(make_model):
    mixture = partial(SparseMoE, num_experts=4)
    rules = [FFNRule([1], mixture), FFNRule([2], mixture, "post_attention"), FFNRule(3, DenseFFN)]
    made = make_model(num_layers=4, ffn=mixture, router_input="pre_attention", ffn_rules=rules)
    read = [block.router_input for block in made.model.model.blocks()]
    assert read == ["pre_attention", "ffn_input", "post_attention", "ffn_input"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 15}, "d_model: 15 is not divisible by num_heads 2"),
        ({"ffn": partial(SparseMoE, num_experts=2, top_k=3)}, "top_k: 3 is more than num_experts"),
        (
            {"ffn": partial(SparseMoE, router=RouterOptions(choice="expert", normalize=False))},
            "not causal: .* allow_non_causal",
        ),
        ({"ffn_rules": [FFNRule([5], DenseFFN)]}, "there is no layer 5; the model has 2"),
        (
            {"ffn": DenseFFN, "router_input": "pre_attention"},
            "^model.router_input: DenseFFN chooses nothing by a vector, .*; leave it out$",
        ),
        (
            {"ffn_rules": [FFNRule(1, DenseFFN, "post_attention")]},
            r"^model.ffn_rules\[0\].router_input: DenseFFN chooses nothing",
        ),
        (
            {"router_input": "before"},
            "^model.router_input: 'before' is not known; choose from: ffn",
        ),
        ({"on_nan": "ignore"}, "on_nan: 'ignore' is not known"),
        ({"attention": "sdpaa"}, "attention: 'sdpaa' is not known; did you mean 'sdpa'"),
        ({"d_model": 0}, "d_model: 0 is out of range"),
        ({"initialize_from": "/nowhere"}, "initialize_from: .*/nowhere does not exist"),
    ],
)
def test_bad_arguments(make_model, arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)


def test_initialize_from_takes_model_and_weights(make_model, tmp_path):
    source = make_model(d_model=32)
    save_checkpoint(tmp_path / "model", source.model)
    started = make_model(d_model=16, initialize_from=str(tmp_path / "model"))
    assert started.model.config.hidden_size == 32
    assert started.model.training
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, started.model.state_dict()[name]), name
    with pytest.raises(InputError, match="has 50 tokens, the data has 60"):
        make_model(vocab_size=60, initialize_from=str(tmp_path / "model"))


def test_one_step_equals_a_plain_loop(make_model, make_trainer, random_tokens):
    """Accumulation and clipping through Lightning equal the same written by hand."""
    model = make_model(optimizer=OptimizerConfig(fused=False), ffn=DenseFFN)
    plain = copy.deepcopy(model.model)
    recorder = Recorder()
    trainer = make_trainer(
        max_steps=1, accumulate_grad_batches=2, gradient_clip_val=0.1, callbacks=[recorder]
    )
    trainer.fit(model, random_tokens)

    batches = list(random_tokens.train_dataloader())[:2]
    losses = [
        plain(b["input_ids"], shift_labels=b["labels"], return_logits=False).loss for b in batches
    ]
    (sum(losses) / 2).backward()
    loss = float(sum(losses).detach() / 2)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    groups = [
        {"params": [p for n, p in plain.named_parameters() if p.ndim == 2 and "embed" not in n]},
        {
            "params": [p for n, p in plain.named_parameters() if p.ndim < 2 or "embed" in n],
            "weight_decay": 0.0,
        },
    ]
    torch.optim.AdamW(groups, lr=1e-3 / 2, betas=(0.9, 0.95), weight_decay=0.1).step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.model.state_dict()[name], parameter, rtol=1e-6, atol=1e-8)
    logged = recorder.rows[-1]
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert logged["train/lr"] == pytest.approx(1e-3 / 2)


def test_logged_losses_are_means_since_the_last_logged_step(
    make_model, make_trainer, random_tokens
):
    seen = []
    collect = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, outputs, *_: seen.append(
            float(outputs["lm_loss"])
        )
    )
    trainer = make_trainer(
        max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2, callbacks=[collect]
    )
    trainer.fit(make_model(), random_tokens)
    assert len(seen) == 8
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(seen[4:]) / 4)


def test_metrics_of_a_run(make_model, make_trainer, random_tokens):
    recorder = Recorder()
    trainer = make_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[recorder])
    model = make_model()
    trainer.fit(model, random_tokens)
    logged = recorder.rows[-1]
    assert logged["tokens"] == 3 * 2 * 4 * 12
    assert logged["step"] == 3
    for layer in (0, 1):
        assert 1.0 <= logged[f"experts/max_over_mean/layer_0{layer}"] <= 4.0
        assert 0.0 < logged[f"experts/entropy/layer_0{layer}"] <= 1.0
        assert 0.0 < logged[f"experts/router_entropy/layer_0{layer}"] <= 1.0
        assert logged[f"experts/dropped/layer_0{layer}"] == 0.0
    assert logged["train/aux/load_balancing"] > 0.0
    assert logged["train/tokens_per_second"] > 0.0
    metrics = training_metrics(trainer)
    per_token = 3 * forward_flops_per_token(model.model, 12)
    expected = per_token * logged["train/tokens_per_second"] / metrics.peak[0]
    assert logged["train/mfu"] == pytest.approx(expected, rel=1e-6)


class Watched(SparseMoE):
    """Counts what the trainer calls, and the tokens it is told about."""

    calls: list[tuple[str, int]]

    def observe(self, stats) -> None:
        super().observe(stats)
        self.calls.append(("observe", int(stats["expert_counts"].sum())))

    def step(self, progress=None) -> None:
        super().step(progress)
        self.calls.append(("step", 0))


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_observe_each_micro_batch_once_and_step_once(
    make_model, make_trainer, random_tokens, recompute
):
    model = make_model(activation_checkpointing=recompute)
    layer = ffn_layers(model.model)[0]
    layer.__class__ = Watched
    layer.calls = []
    trainer = make_trainer(max_steps=2, accumulate_grad_batches=3)
    trainer.fit(model, random_tokens)
    step = [("observe", 4 * 12 * 2)] * 3 + [("step", 0)]
    assert layer.calls == step * 2


def test_selection_bias_learns_from_the_whole_accumulated_step(
    make_model, make_trainer, random_tokens
):
    router = RouterOptions(score="sigmoid", selection_bias=True, bias_update_rate=0.5)
    model = make_model(ffn=partial(SparseMoE, num_experts=4, d_expert=8, router=router))
    before = copy.deepcopy(model.model)
    make_trainer(max_steps=1, accumulate_grad_batches=3).fit(model, random_tokens)
    batches = list(random_tokens.train_dataloader())[:3]
    counts = sum(before(b["input_ids"]).ffn_stats[0]["expert_counts"] for b in batches).float()
    bias = ffn_layers(model.model)[0].gate.selection_bias
    assert torch.equal(bias, 0.5 * (counts.mean() - counts).sign())


@pytest.mark.parametrize("layer", [SparseMoE, PEER, ProductKeyMemory])
def test_activation_checkpointing_changes_no_number(make_model, make_trainer, random_tokens, layer):
    size = {"num_experts": 4} if layer is SparseMoE else {"num_heads": 2, "top_k": 4}
    ffn = partial(layer, **size)
    models = [make_model(ffn=ffn), make_model(ffn=ffn, activation_checkpointing=True)]
    assert models[1].model.model.gradient_checkpointing
    for model in models:
        make_trainer(max_steps=2).fit(model, random_tokens)
    plain, recomputed = (model.state_dict() for model in models)
    for name, tensor in plain.items():
        assert torch.equal(tensor, recomputed[name]), name


def test_validation_is_exact_over_tokens(make_model, make_trainer, random_tokens):
    """Batches of different size, and ignored labels, weigh as many tokens as they have."""
    loader = random_tokens.val_dataloader()
    loader.dataset[0]["labels"][3:] = -100
    random_tokens.val_dataloader = lambda: loader
    model = make_model()
    results = make_trainer().validate(model, random_tokens, verbose=False)[0]
    ids = torch.stack([row["input_ids"] for row in loader.dataset])
    labels = torch.stack([row["labels"] for row in loader.dataset])
    with torch.no_grad():
        logits = model.model.eval()(ids).logits.double()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert results["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert results["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert results["val/bits_per_byte"] == pytest.approx(loss / math.log(2) / 3.0, rel=1e-6)


def poison(model: LanguageModel, steps: set[int]) -> None:
    """Make the loss NaN in these optimizer steps."""
    forward = model.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if model.training and model.global_step in steps:
            output.loss = output.loss * float("nan")
        return output

    model.model.forward = poisoned


def test_nan_stops_before_anything_is_updated(make_model, make_trainer, random_tokens):
    model = make_model()
    poison(model, {2})
    states = []
    keep = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: states.append(copy.deepcopy(model.state_dict()))
    )
    trainer = make_trainer(callbacks=[keep])
    with pytest.raises(
        InputError, match=r"step 3: loss nan; nothing was updated .*on_nan to skip"
    ) as e:
        trainer.fit(model, random_tokens)
    assert "\n" not in str(e.value)
    assert len(states) == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[-1][name]), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nan_skips_the_whole_accumulated_step(make_model, make_trainer, random_tokens, name):
    model = make_model(on_nan="skip", optimizer=OptimizerConfig(name=name))
    poison(model, {1})
    states, moments = [], []

    def keep(trainer, *_) -> None:
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    recorder = Recorder()
    trainer = make_trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[pl.callbacks.LambdaCallback(on_train_batch_end=keep), recorder],
    )
    trainer.fit(model, random_tokens)
    first, second, third = states[1::2]
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not any(torch.equal(second[n], third[n]) for n in second if n.endswith("_proj.weight"))
    for key, state in moments[1].items():
        for field, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[3][key][field]))
    assert model.guard.skipped == 1
    assert recorder.rows[-1]["train/skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_infinite_gradient_counts_although_the_loss_is_finite(
    make_model, make_trainer, random_tokens
):
    model = make_model()
    model.model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(InputError, match=r"step 1: the gradient norm is (inf|nan)"):
        make_trainer().fit(model, random_tokens)


def test_too_many_skipped_steps_stop(make_model, make_trainer, random_tokens):
    model = make_model(on_nan="skip")
    poison(model, set(range(3, 100)))
    with pytest.raises(InputError, match="step 13: loss nan, the 10th skipped step in a row"):
        make_trainer(max_steps=50).fit(model, random_tokens)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_model_trains_the_same(
    make_model, make_trainer, random_tokens, monkeypatch, recompute
):
    """With recomputation also the running averages of a batch norm, which count a batch once."""
    ffn = partial(PEER, num_experts=64, num_heads=2, top_k=4) if recompute else DenseFFN
    options = {"ffn": ffn, "num_layers": 1 if recompute else 2}
    models = [
        make_model(**options),
        make_model(**options, compile=True, activation_checkpointing=recompute),
    ]
    # Tracing is what can go wrong here; generating C++ would only take half a minute more.
    compile_eagerly = partial(models[1].model.compile, backend="eager")
    monkeypatch.setattr(models[1].model, "compile", compile_eagerly)
    for model in models:
        make_trainer(max_steps=2).fit(model, random_tokens)
    assert models[1].model._compiled_call_impl is not None
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_bf16_mixed_keeps_parameters_in_fp32(make_model, make_trainer, random_tokens):
    model = make_model()
    trainer = make_trainer(max_steps=2, precision="bf16-mixed")
    trainer.fit(model, random_tokens)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("ffn", [DenseFFN, PersistentMemoryAttention])
def test_forward_flops_equal_torchs_counter(make_model, ffn):
    model = make_model(ffn=ffn, num_heads=4, num_kv_heads=2, attention="eager").model
    ids = torch.zeros(2, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = counter.get_total_flops()
    assert forward_flops_per_token(model, 12) * ids.numel() == pytest.approx(counted, rel=1e-3)


def test_active_parameters(make_model):
    model = make_model().model
    total, active = count_parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    idle = 2 * (4 - 2) * 3 * 16 * 8  # layers, idle experts, matrices of an expert
    assert total - active == idle


def test_peak_is_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr(throughput, "PROBE_SECONDS", PROBE_SECONDS)
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 0 < peak < math.inf
    assert source == "measured matmul"


@pytest.mark.parametrize("rate", [1e8, 1e9, 1e10, 1e12])
def test_measuring_a_cpu_ends_soon_however_slow_it_is(monkeypatch, rate):
    taken, setting_up = [], [1.0]

    def product(device: torch.device, dtype: torch.dtype, size: int) -> float:
        taken.append(2 * size**3 / rate)
        return taken[-1] + (setting_up.pop() if setting_up else 0.0)

    monkeypatch.setattr(throughput, "_product_seconds", product)
    monkeypatch.setattr(throughput, "PROBE_SECONDS", PROBE_SECONDS)
    peak, _ = peak_flops(torch.device("cpu"), torch.bfloat16)
    assert peak == pytest.approx(rate)
    assert sum(taken) < 0.15
    largest = 2 * 1024**3 / rate
    assert (largest in taken) == (largest < PROBE_SECONDS)


def test_products_that_had_to_wait_do_not_make_a_cpu_slow(monkeypatch):
    waits = iter([0.0, 0.05, 0.04, 0.0, 0.05, 0.03])

    def product(device: torch.device, dtype: torch.dtype, size: int) -> float:
        return 2 * size**3 / 1e11 + next(waits, 0.0)

    monkeypatch.setattr(throughput, "_product_seconds", product)
    monkeypatch.setattr(throughput, "PROBE_SECONDS", PROBE_SECONDS)
    assert peak_flops(torch.device("cpu"), torch.float32)[0] == pytest.approx(1e11)


def test_schedule_runs_over_optimizer_steps(make_model, make_trainer, random_tokens):
    recorder = Recorder()
    schedule = ScheduleConfig("wsd", warmup_steps=2, decay_fraction=0.5, min_lr_ratio=0.0)
    model = make_model(schedule=schedule, optimizer=OptimizerConfig(lr=1.0))
    make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[recorder]).fit(
        model, random_tokens
    )
    rates = [row["train/lr"] for row in recorder.rows if "train/lr" in row]
    assert list(dict.fromkeys(rates)) == [0.5, 1.0]
    assert rates[-1] == pytest.approx(0.5)
