"""Every parameter is in exactly one group, and the combined optimizer is the two it combines."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

import moezoo
from moezoo import InputError, ParameterGroup, dtype_speed
from moezoo_kernels import native as kernels
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_train.optim.muon import (
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_STEPS,
    iterate,
    orthogonalize,
)
from moezoo_train.optim.optimizer import (
    CombinedOptimizer,
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
)
from moezoo_train.optim.schedule import ScheduleConfig, build_schedule, lr_factor


class Slow(moezoo.DenseFFN):
    """A layer that wants its matrices at a constant tenth of the learning rate."""

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("slow", list(self.parameters()), 0.1, True, schedule=False)]


@pytest.fixture
def model() -> MoezooForCausalLM:
    torch.manual_seed(0)
    config = MoezooConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        ffn=[
            {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"bias": True}},
            {"layers": [1], "class_path": "moezoo.SparseMoE", "init_args": {"num_experts": 4}},
        ],
    )
    return MoezooForCausalLM(config)


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_sgd_steps_down_the_gradient_and_remembers_nothing(model):
    fill_gradients(model, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig("sgd", lr=0.5, weight_decay=0.1))
    optimizer.step()

    decayed = {p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert 0 < len(decayed) < len(before)
    for name, parameter in model.named_parameters():
        kept = before[name] * (0.95 if parameter in decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), kept - 0.5 * parameter.grad)
    assert not any(value is not None for s in optimizer.state.values() for value in s.values())


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_exactly_one_group(model, name, tied):
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(11, 8))
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_vectors_and_embeddings_are_not_decayed(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "embed" in name
        # biases of stacked experts would be matrices: this model has none
        assert decay[parameter] == (0.0 if plain else 0.3), name


def test_frozen_parameters_are_left_out(model):
    model.model.embed_tokens.weight.requires_grad_(False)
    grouped = [p for group in parameter_groups(model) for p in group.parameters]
    assert model.model.embed_tokens.weight not in set(grouped)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="no trained parameter"):
        build_optimizer(model, OptimizerConfig())


def test_layers_choose_their_treatment():
    model = nn.ModuleList([Slow(8), Slow(8), nn.Linear(8, 8)])
    slow = parameter_groups(model)[0]
    assert (slow.name, len(slow.parameters)) == ("slow", 6)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=1e-2, muon_lr=0.5))
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["slow"]["lr"] == pytest.approx(1e-3)
    assert by_name["slow"]["algorithm"] == "adamw"
    schedule = build_schedule(optimizer, ScheduleConfig(warmup_steps=4), 20)
    assert by_name["slow"]["lr"] == pytest.approx(1e-3)
    assert by_name["matrices, muon"]["lr"] == pytest.approx(0.5 / 4)
    optimizer.step()
    schedule.step()
    assert by_name["slow"]["lr"] == pytest.approx(1e-3)
    assert by_name["matrices, muon"]["lr"] == pytest.approx(0.5 / 2)


def test_muon_takes_the_matrices_of_the_blocks(model):
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    names = {p: n for n, p in model.named_parameters()}
    muon = {
        names[p] for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]
    }
    block = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
    dense = [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    assert muon == {
        *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in block),
        *(f"model.layers.0.{name}" for name in dense),
        *(f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")),
    }


def test_combined_optimizer_equals_the_two_apart(model):
    config = OptimizerConfig(name="muon", fused=False, muon_dtype="bfloat16")  # as torch's
    twin = copy.deepcopy(model)
    combined = build_optimizer(model, config)
    assert isinstance(combined, CombinedOptimizer)
    names = {p: n for n, p in model.named_parameters()}
    twins = dict(twin.named_parameters())
    apart = []
    stacks: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
    for group in combined.param_groups:
        parameters = [twins[names[p]] for p in group["params"]]
        if group["algorithm"] == "muon":
            for stack in [p for p in parameters if p.ndim == 3]:
                stacks.append((stack, [nn.Parameter(m.clone()) for m in stack.detach()]))
            parameters = [p for p in parameters if p.ndim == 2]
            parameters += [matrix for _, matrices in stacks for matrix in matrices]
            apart.append(torch.optim.Muon(parameters, lr=0.02, weight_decay=group["weight_decay"]))
        else:
            decay = group["weight_decay"]
            betas = config.betas
            apart.append(
                torch.optim.AdamW(parameters, 1e-3, betas=betas, eps=1e-8, weight_decay=decay)
            )
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(twin, step)
        for stack, matrices in stacks:
            for matrix, gradient in zip(matrices, stack.grad, strict=True):
                matrix.grad = gradient
        combined.step()
        for optimizer in apart:
            optimizer.step()
    assert len(stacks) == 2
    for stack, matrices in stacks:
        stack.data = torch.stack([m.detach() for m in matrices])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twins[name]), name


def _muon_dtypes(optimizer: torch.optim.Optimizer) -> set[str]:
    return {group["dtype"] for group in optimizer.param_groups if group["algorithm"] == "muon"}


def test_muon_computes_in_fp32_on_a_cpu_and_in_bf16_elsewhere(model, monkeypatch):
    muon = OptimizerConfig("muon")
    seen = []
    monkeypatch.setattr(
        "moezoo_train.optim.muon.orthogonalize", lambda stack, dtype: seen.append(dtype) or stack
    )
    fill_gradients(model, 0)
    on_cpu = build_optimizer(model, muon)
    on_cpu.step()
    assert _muon_dtypes(on_cpu) == {"float32"}
    assert set(seen) == {torch.float32}

    elsewhere = copy.deepcopy(model).to("meta")  # no CPU, and there on every machine
    assert _muon_dtypes(build_optimizer(elsewhere, muon)) == {"bfloat16"}
    assert muon.on("cuda:1").muon_dtype == "bfloat16"


def test_muon_computes_in_bf16_on_a_cpu_that_is_quick_at_it(model, monkeypatch):
    products = {torch.float32: 100.0, torch.bfloat16: 900.0, torch.float16: 50.0}
    monkeypatch.setattr(dtype_speed, "speeds", lambda: dtype_speed.Speeds(products))
    optimizer = build_optimizer(model, OptimizerConfig("muon"))
    assert _muon_dtypes(optimizer) == {"bfloat16"}
    assert OptimizerConfig("muon").on("cpu").muon_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chosen_dtype_of_muon_holds_on_every_device(model, dtype):
    muon = OptimizerConfig("muon", muon_dtype=dtype)
    for device in ("cpu", "meta"):
        assert _muon_dtypes(build_optimizer(copy.deepcopy(model).to(device), muon)) == {dtype}


def test_what_runs_are_known_by_says_in_which_dtype_muon_computed():
    assert OptimizerConfig("muon").on("cpu") == OptimizerConfig("muon", muon_dtype="float32")
    # Those of other optimizers go by what it was called before there was a choice.
    assert OptimizerConfig().on("cpu") == OptimizerConfig(muon_dtype="bfloat16")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trips_exactly(model, name, tmp_path):
    build = partial(build_optimizer, config=OptimizerConfig(name=name))
    optimizer = build(model)
    for step in range(2):
        fill_gradients(model, step)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", weights_only=True)
    twin = MoezooForCausalLM(model.config)
    twin.load_state_dict(saved["model"])
    resumed = build(twin)
    resumed.load_state_dict(saved["optimizer"])
    for each, its in ((model, optimizer), (twin, resumed)):
        fill_gradients(each, 7)
        its.step()
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), key
    assert len(resumed.state) == len(list(twin.parameters()))


def test_closure_runs_once_with_gradients(model):
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        fill_gradients(model, 0)
        return 1.5

    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_parameters_without_gradient_stay(model):
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.5))
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adam"}, "optimizer.name: 'adam' is not known; did you mean 'adamw'"),
        ({"lr": -1.0}, "optimizer.lr: -1 is out of range"),
        ({"lr": math.nan}, "optimizer.lr: nan is out of range"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas\[1\]: 1 never forgets"),
        ({"betas": (0.9,)}, "optimizer.betas: .* is no pair; write"),
        ({"muon_momentum": 1.5}, "optimizer.muon_momentum"),
        ({"muon_scale": "big"}, "optimizer.muon_scale"),
        ({"muon_dtype": "fp32"}, "optimizer.muon_dtype: 'fp32' is not .* mean 'float32'"),
    ],
)
def test_bad_optimizer_options(arguments, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**arguments)


def test_cosine_schedule():
    config = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(config, step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(config, 500, 110) == pytest.approx(0.1)


def test_wsd_schedule():
    config = ScheduleConfig("wsd", warmup_steps=5, decay_fraction=0.2, min_lr_ratio=0.0)
    factors = [lr_factor(config, step, 100) for step in range(101)]
    assert factors[4:81] == [1.0] * 77
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_constant_schedule_needs_no_end():
    config = ScheduleConfig("constant", warmup_steps=4)
    assert [lr_factor(config, s, None) for s in (0, 1, 3, 4, 999)] == [0.25, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        (ScheduleConfig(), None, "set trainer.max_steps or schedule.total_steps"),
    ],
)
def test_schedule_and_run_must_fit(config, steps, message):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(InputError, match=message):
        build_schedule(optimizer, config, steps)


def test_bad_schedule_options():
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        ScheduleConfig("cosin")
    with pytest.raises(InputError, match=r"schedule\.min_lr_ratio"):
        ScheduleConfig(min_lr_ratio=2.0)
    with pytest.raises(InputError, match=r"schedule\.warmup_steps"):
        ScheduleConfig(warmup_steps=-1)


@pytest.mark.parametrize("native", ["", "off"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_orthogonalization_is_torchs(shape, native, monkeypatch):
    monkeypatch.setattr(kernels, "load", kernels.load if native == "" else lambda: "off")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = _zeropower_via_newtonschulz(matrix, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, 1e-7)
    [rounded] = orthogonalize([matrix], torch.bfloat16)
    assert torch.equal(rounded, expected)
    stack = torch.stack([matrix, -matrix, 3 * matrix])
    [precise, stacked] = orthogonalize([matrix.clone(), stack], torch.float32)
    torch.testing.assert_close(precise, expected.float(), rtol=0, atol=3e-2)
    [doubled] = orthogonalize([matrix.double()], torch.float64)
    torch.testing.assert_close(doubled.float(), precise, rtol=0, atol=1e-5)
    signs = torch.tensor([1.0, -1.0, 1.0]).reshape(3, 1, 1)
    torch.testing.assert_close(
        stacked * signs, doubled.float().expand(3, -1, -1), rtol=0, atol=1e-5
    )


def test_transposed_and_empty_matrices_are_orthogonalized():
    transposed = torch.randn(9, 4).T
    [result, none] = orthogonalize([transposed.clone(), torch.zeros(0, 3, 4)], torch.float32)
    torch.testing.assert_close(result, iterate(transposed), rtol=0, atol=1e-5)
    assert none.shape == (0, 3, 4)
