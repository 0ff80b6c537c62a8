"""Adapters: little is trained, nothing else moves, and merged they are the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from moezoo import CarvedMoE, InputError
from moezoo_models.checkpoints.directory import load_checkpoint, quiet
from moezoo_models.checkpoints.stock import load_as_it_is, predict
from moezoo_train.checkpoint.export import export
from moezoo_train.finetune.lora import LoRAOptions, merged_state
from moezoo_train.measure.throughput import (
    count_parameters,
    count_trained,
    forward_flops_per_token,
)
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from two_processes import assert_same_directories

peft = pytest.importorskip("peft", reason="needs moezoo[lora]")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "flex_olmo")
SMALL = LoRAOptions(rank=2)


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(300, (2, length + 1), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), use_cache=False).logits


def step(module: LanguageModel, count: int = 2) -> None:
    optimizer = build_optimizer(module.model, OptimizerConfig(lr=1e-2))
    for _ in range(count):
        module.model.train()
        predict(module.model, tokens()[:, :-1], tokens()[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["llama", *NAMES, "ours", "carved"])
def test_adapters_move_and_the_base_does_not(name, directory, tmp_path):
    base, _ = load_as_it_is(directory(name))
    module = LanguageModel(300, initialize_from=str(directory(name)), lora=SMALL)
    torch.testing.assert_close(logits(module.model), logits(base))  # adapters begin as zero
    before = {key: value.clone() for key, value in module.model.state_dict().items()}
    step(module)

    after = module.model.state_dict()
    trained = {key for key, p in module.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in key or key.endswith(".u") for key in trained)
    for key, tensor in after.items():
        moved = not torch.equal(tensor, before[key])
        assert moved == (key in trained), key
    attention = [key for key in trained if "self_attn" in key]
    experts = [key for key in trained if "experts" in key]
    assert len(attention) == 2 * 2 * 4  # layers, factors, projections
    assert len(experts) == (0 if name == "llama" else 2 * 2 * 2)

    added = [t for key, t in after.items() if ".lora_" in key or key.endswith(".u")]
    assert count_trained(module.model) == sum(tensor.numel() for tensor in added)
    assert count_parameters(module.model) == count_parameters(base)

    expected = logits(module.model)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    module.save(tmp_path / "model", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {
        k: v.shape for k, v in base.state_dict().items()
    }
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(logits(module.model), expected)  # saving changed nothing


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_saved_adapters_are_peft_s(name, directory, tmp_path):
    """PEFT itself puts them back on the untouched directory."""
    module = LanguageModel(300, initialize_from=str(directory(name)), lora=SMALL)
    step(module)
    module.save(tmp_path / "model", None)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in kept)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(directory(name)))
    base, _ = load_as_it_is(directory(name))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(module.model), rtol=1e-5, atol=2e-6)


def test_merging_equals_pefts_own(directory):
    module = LanguageModel(300, initialize_from=str(directory("mixtral")), lora=SMALL)
    step(module)
    ours = merged_state(module.model)
    tuner = peft.tuners.lora.LoraModel.__new__(peft.tuners.lora.LoraModel)
    torch.nn.Module.__init__(tuner)
    tuner.model, tuner.prefix = module.model, "lora_"
    merged = tuner.merge_and_unload().state_dict()
    assert merged.keys() == ours.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(ours[key], tensor)


@pytest.fixture
def tied(tmp_path):
    """Write a Llama whose head is its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_an_adapted_head_is_tied_no_more(tied, tmp_path):
    """Every reader gets the head that was trained, and the embeddings that were not."""
    head = LoRAOptions(rank=2, target_modules=["lm_head"])
    module = LanguageModel(300, initialize_from=str(tied), lora=head)
    step(module)
    trained = logits(module.model)
    module.save(tmp_path / "model", None)
    assert module.model.config.tie_word_embeddings
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    untouched = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    for load in (load_checkpoint, load_as_it_is):
        loaded, _ = load(tmp_path / "model")
        torch.testing.assert_close(logits(loaded), trained)
        assert torch.equal(loaded.get_input_embeddings().weight, untouched)
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(stock), trained)


def test_a_tied_head_stays_tied_where_it_is_not_adapted(tied, tmp_path):
    module = LanguageModel(300, initialize_from=str(tied), lora=SMALL)
    step(module)
    module.save(tmp_path / "model", None)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "model")[0]), logits(module.model))


def test_cmoe_trains_its_scale_beside_adapters(directory, tmp_path):
    """What the authors' code does not: PEFT freezes u there."""
    module = LanguageModel(300, initialize_from=str(directory("carved")), lora=SMALL)
    step(module, 1)
    layers = [m for m in module.model.modules() if isinstance(m, CarvedMoE)]
    assert all(layer.u.abs().min() > 0 for layer in layers)
    module.save(tmp_path / "model", None)
    loaded, _ = load_checkpoint(tmp_path / "model")
    again = [m for m in loaded.modules() if isinstance(m, CarvedMoE)]
    kept = load_file(tmp_path / "adapter" / "trained.safetensors")
    for number, (layer, other) in enumerate(zip(layers, again, strict=True)):
        assert torch.equal(layer.u, other.u)
        assert torch.equal(layer.u, kept[f"model.layers.{number}.mlp.u"])
        assert f"model.layers.{number}.mlp.gate.selection_bias" in kept
    assert forward_flops_per_token(module.model, 12) == forward_flops_per_token(loaded, 12)


def test_a_run_resumes_exactly_and_keeps_adapters_only(directory, command, tmp_path, capsys):
    lora = {"model.lora.rank": 2, "model.lora.alpha": 8}
    start = directory("mixtral")
    run(command("whole", start, **lora))
    total, active = count_parameters(load_as_it_is(start)[0])
    d_model, keys, width, experts, layers, rank = 16, 8, 48, 4, 2, 2
    attention = 2 * (d_model + d_model) + 2 * (d_model + keys)
    stacks = experts * ((d_model + 2 * width) + (width + d_model))
    trained = layers * rank * (attention + stacks)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    names = ("total_parameters", "active_parameters", "trained_parameters")
    assert [report[name] for name in names] == [total, active, trained]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"trained │ {trained:,} ({trained / total:.2%} of all)" in printed
    run(command("part", start, **lora, **{"trainer.max_steps": 4}))
    run([*command("part", start, **lora), "--ckpt_path=last"])
    states = []
    for name in ("whole", "part"):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        states.append(torch.load(file, weights_only=True)["state_dict"])
    assert states[0].keys() > {"model.model.layers.0.self_attn.q_proj.lora_A.default.weight"}
    assert all(".lora_" in key for key in states[0])
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key

    export(file, tmp_path / "merged", base=str(start))
    assert_same_directories(tmp_path / "part" / "model", tmp_path / "merged")
    for base, message in ((None, "base: .* adapters only"), ("llama", "base: .* is not the model")):
        other = None if base is None else str(directory(base))
        with pytest.raises(InputError, match=message):
            export(file, tmp_path / "refused", base=other)
    models = [load_as_it_is(tmp_path / name / "model")[0] for name in ("whole", "part")]
    assert torch.equal(logits(models[0]), logits(models[1]))
    run(["validate", *command("whole", start, **lora)[1:]])

    with pytest.raises(InputError, match=r"ckpt_path: lora.alpha is 8.0 in the checkpoint, but 9"):
        run([*command("part", start, **(lora | {"model.lora.alpha": 9})), "--ckpt_path=last"])


def test_adapters_are_not_put_on_other_weights(directory, command, copy_of):
    start = copy_of("mixtral")
    run(command("run", start, **{"model.lora.rank": 2, "trainer.max_steps": 2}))
    model, _ = load_as_it_is(start)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(start)
    with pytest.raises(InputError, match=r"ckpt_path: lora.base is .* in the checkpoint, but"):
        run([*command("run", start, **{"model.lora.rank": 2}), "--ckpt_path=last"])


def test_what_is_adapted_can_be_chosen(directory):
    def trained(**options) -> set[str]:
        module = LanguageModel(
            300, initialize_from=str(directory("mixtral")), lora=LoRAOptions(rank=2, **options)
        )
        return {key for key, p in module.model.named_parameters() if p.requires_grad}

    only = trained(target_modules=["q_proj"], target_parameters=[], dropout=0.1)
    assert {key.split(".")[4] for key in only} == {"q_proj"}
    router = trained(target_parameters=["experts.down_proj"], train_also=["gate.weight"])
    assert {key for key in router if ".lora_" not in key} == {
        f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)
    }
    assert sum("experts" in key for key in router) == 2 * 2


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        ({"rank": 0}, {}, "lora.rank: 0 is out of range"),
        (
            {"target_modules": ["q_pro"]},
            {},
            "lora.target_modules: .*'q_pro'; did you mean 'q_proj'",
        ),
        ({"target_parameters": ["w1"]}, {}, "lora.target_parameters: the model has no 'w1'"),
        ({"train_also": ["u"]}, {}, "lora.train_also: the model has no 'u'"),
        ({"dropout": 0.1}, {}, "lora.dropout: .*target_parameters to \\[\\]"),
        ({}, {"initialize_from": None}, "lora: adapters need a trained model; set initialize_from"),
        ({}, {"optimizer": OptimizerConfig("muon")}, "optimizer.name: muon .* use adamw"),
        ({}, {"compile": True}, "compile: .*set it to false"),
    ],
)
def test_mistakes(lora, changes, message, directory):
    arguments = {"initialize_from": str(directory("mixtral"))} | changes
    with pytest.raises(InputError, match=message) as caught:
        LanguageModel(300, lora=LoRAOptions(**lora), **arguments)
    assert "\n" not in str(caught.value)


def test_without_peft_it_says_what_to_install(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"lora: .*pip install 'moezoo\[lora\]'"):
        LanguageModel(300, initialize_from=str(directory("llama")), lora=SMALL)
