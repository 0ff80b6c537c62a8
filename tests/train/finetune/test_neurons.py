"""Slices of neurons: they alone move, and merged they are the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moezoo import DenseFFN, InputError
from moezoo_models.checkpoints.stock import load_as_it_is, predict
from moezoo_train.checkpoint.export import export
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.finetune.neurons import NeuronOptions, SlicedLinear, slice_linear
from moezoo_train.finetune.sparse_memory import SparseMemoryOptions
from moezoo_train.measure.throughput import count_parameters, count_trained
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.parallel.fit_strategy import check_strategy
from moezoo_train.parallel.fsdp2 import FSDP2Strategy
from moezoo_train.parallel.zero import ZeROStrategy
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

ALL = NeuronOptions(0.1, ("down", "up", "gate"))


def tokens() -> torch.Tensor:
    return torch.randint(300, (2, 13), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("columns", [True, False])
def test_a_sliced_map_equals_its_sum_and_all_gradients(columns):
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    neurons = torch.tensor([0, 3, 4])
    slice_linear(linear, neurons, columns)
    nn.init.normal_(linear.delta)
    hidden = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    linear(hidden).square().sum().backward()
    got = hidden.grad, linear.delta.grad

    whole = weight.clone()
    for place, neuron in enumerate(neurons):
        where = (slice(None), neuron) if columns else neuron
        whole[where] += linear.delta.detach()[(slice(None), place) if columns else place]
    torch.testing.assert_close(linear.weight, whole)
    whole.requires_grad_()
    again = hidden.detach().requires_grad_()
    (again @ whole.T + bias).square().sum().backward()
    torch.testing.assert_close(got[0], again.grad)
    torch.testing.assert_close(got[1], whole.grad[:, neurons] if columns else whole.grad[neurons])
    assert linear._parameters["weight"].grad is None
    assert linear.bias.grad is None


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", NeuronOptions()), ("qwen3", ALL), ("moezoo", ALL)],
)
def test_slices_move_and_nothing_else(name, options, directory, tmp_path):
    if name == "moezoo":
        torch.manual_seed(0)
        own = LanguageModel(300, d_model=16, num_layers=2, num_heads=2, max_length=64)
        own.save(tmp_path / "base", None)
    start = tmp_path / "base" if name == "moezoo" else directory(name)
    base, _ = load_as_it_is(start)
    module = LanguageModel(300, initialize_from=str(start), neurons=options)
    assert torch.equal(logits(module.model), logits(base))
    optimizer = build_optimizer(module.model, OptimizerConfig(lr=1e-2))
    for _ in range(2):
        module.model.train()
        predict(module.model, tokens()[:, :-1], tokens()[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    )
    sliced = [m for m in module.model.modules() if isinstance(m, SlicedLinear)]
    count = max(1, round(options.ratio * 48))
    assert len(sliced) == 2 * len(options.projections)
    assert kept == 2 * len(sliced) * count * 16
    assert count_trained(module.model) == len(sliced) * count * 16
    assert count_parameters(module.model) == count_parameters(base)

    expected = logits(module.model)
    module.save(tmp_path / "model", None)
    loaded, _ = load_as_it_is(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(module.model), expected)  # saving changed nothing
    after, before = loaded.state_dict(), base.state_dict()
    assert after.keys() == before.keys()
    chosen = {}
    for key, tensor in after.items():
        block, _, last = key.removesuffix(".weight").rpartition(".")
        projection = last.removesuffix("_proj")
        if ".mlp" not in block or projection not in options.projections:
            assert torch.equal(tensor, before[key]), key
            continue
        moved = (tensor != before[key]).any(0 if projection == "down" else 1)
        assert moved.sum() == count
        assert torch.equal(chosen.setdefault(block, moved), moved)  # one set in a block
    first, second = chosen.values()
    assert not torch.equal(first, second)


def test_the_weight_that_is_read_is_the_one_that_computes():
    """Paths that multiply by a projection's weight themselves see the slices."""
    torch.manual_seed(0)
    layer = DenseFFN(8, 12, bias=True)
    slice_linear(layer.down_proj, torch.tensor([1, 5]), columns=True)
    slice_linear(layer.up_proj, torch.tensor([1, 5]), columns=False)
    for linear in (layer.down_proj, layer.up_proj):
        nn.init.normal_(linear.delta)
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(layer(hidden).hidden, layer.reference(hidden).hidden)


def test_a_run_resumes_exactly_and_keeps_slices_only(directory, command, tmp_path):
    options, start = {"model.neurons.ratio": 0.1}, directory("llama")
    run(command("whole", start, **options))
    run(command("part", start, **options, **{"trainer.max_steps": 4}))
    run([*command("part", start, **options), "--ckpt_path=last"])
    states = []
    for name in ("whole", "part"):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        states.append(torch.load(file, weights_only=True)["state_dict"])
    assert {key.rpartition(".")[2] for key in states[0]} >= {"delta", "neurons"}
    assert not any(key.endswith(("weight", "bias")) for key in states[0])
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    assert all(tensor.any() for key, tensor in states[0].items() if key.endswith("delta"))

    export(file, tmp_path / "merged", base=str(start))
    models = [load_as_it_is(tmp_path / each)[0] for each in ("part/model", "whole/model", "merged")]
    assert torch.equal(logits(models[0]), logits(models[2]))
    assert torch.equal(logits(models[0]), logits(models[1]))
    for base, message in ((None, "base: .* neurons only"), ("qwen3", "base: .* is not the model")):
        other = None if base is None else str(directory(base))
        with pytest.raises(InputError, match=message):
            export(file, tmp_path / "refused", base=other)
    with pytest.raises(InputError, match=r"ckpt_path: neurons.seed is 0 in the checkpoint, but 1"):
        run([*command("part", start, **options, **{"model.neurons.seed": 1}), "--ckpt_path=last"])


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"ratio": 0}, {}, "neurons.ratio: 0 trains nothing; give"),
        ({"ratio": 2}, {}, "neurons.ratio: 2 is out of range"),
        ({"projections": ()}, {}, "neurons.projections: there is none"),
        ({"projections": ("dow",)}, {}, "neurons.projections: 'dow'.*did you mean 'down'"),
        ({"seed": -1}, {}, "neurons.seed: -1"),
        ({}, {"initialize_from": None}, "neurons: .*; set initialize_from"),
        ({}, {"initialize_from": "mixtral"}, "neurons: .* has no dense .*by lora"),
        ({}, {"initialize_from": "qwen2_moe"}, "neurons: .* has no dense"),  # shares none
        ({}, {"lora": LoRAOptions()}, "neurons: lora is set too"),
        ({}, {"sparse_memory": SparseMemoryOptions()}, "neurons: sparse_memory is set too"),
        ({}, {"optimizer": OptimizerConfig("muon")}, "optimizer.name: muon .* use adamw"),
        ({}, {"compile": True}, "compile: .*set it to false"),
    ],
)
def test_mistakes(options, changes, message, directory):
    arguments = {"initialize_from": "llama"} | changes
    if arguments["initialize_from"] is not None:
        arguments["initialize_from"] = str(directory(arguments["initialize_from"]))
    with pytest.raises(InputError, match=message) as caught:
        LanguageModel(300, neurons=NeuronOptions(**options), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ZeROStrategy])
def test_strategies_that_shard_are_refused(strategy, directory):
    start = str(directory("llama"))
    module = LanguageModel(300, initialize_from=start, neurons=NeuronOptions())
    with pytest.raises(InputError, match=r"trainer.strategy: .* neurons; use ddp"):
        check_strategy(strategy(), module, fitting=True)
