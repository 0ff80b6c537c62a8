"""Runs that start from a directory: any architecture that conversion reads or writes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.checkpoints.stock import (
    load_any_with_tokenizer,
    load_as_it_is,
    predict,
    stacked_experts,
)
from moezoo_models.evaluation.perplexity import evaluate_text
from moezoo_train.checkpoint.export import export
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.measure.throughput import count_parameters, forward_flops_per_token
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from two_processes import assert_same_directories

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

DENSE = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "flex_olmo")


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(300, (2, length + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, "ours", "carved"])
def test_one_step_and_back_into_transformers(name, directory, tmp_path, make_trainer):
    """Every tensor that has a gradient moves; what is saved loads unmodified and says the same."""
    module = LanguageModel(300, initialize_from=str(directory(name)))
    before = {key: value.clone() for key, value in module.model.named_parameters()}
    optimizer = build_optimizer(module.model, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    output = predict(module.model, tokens()[:, :-1], tokens()[:, 1:])
    output.loss.backward()
    gradients = {key: p.grad for key, p in module.model.named_parameters()}
    moved = {key for key, gradient in gradients.items() if gradient is not None and gradient.any()}
    optimizer.step()
    for key, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[key]) == (key not in moved), key
    assert sum(before[key].numel() for key in moved) > 0.8 * sum(p.numel() for p in before.values())

    module.save(tmp_path / "model", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if name in MIXTURES:  # whose experts have other last bits by other implementations
        loaded.set_experts_implementation("moezoo")
    kind = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    assert kind == (name if name in DENSE + MIXTURES else "moezoo")
    with torch.no_grad():
        expected = module.model.eval()(input_ids=tokens(), use_cache=False).logits
        torch.testing.assert_close(
            loaded.eval()(input_ids=tokens(), use_cache=False).logits, expected, rtol=0, atol=0
        )


def test_experts_whose_rows_are_no_multiple_of_16_bytes_run(tmp_path):
    """Transformers' default for experts refuses them."""
    config = MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=5, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model, _ = load_as_it_is(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    with torch.no_grad():
        found, expected = (m(input_ids=tokens()).logits for m in (model, stock))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*MIXTURES, "llama"])
def test_experts_of_mixtures_run_by_our_kernels(name, directory, tmp_path):
    model, _ = load_as_it_is(directory(name))
    assert (model.get_experts_implementation()[""] == "moezoo") == (name in MIXTURES)
    save_checkpoint(tmp_path / "again", model)
    assert "moezoo" not in (tmp_path / "again" / "config.json").read_text()
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
        if name in MIXTURES:
            model.set_experts_implementation("eager")
        expected = model(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MIXTURES)
def test_loss_is_that_of_transformers(name, directory):
    """The auxiliary loss too, at the configuration's coefficient; and its gradient."""
    model, _ = load_as_it_is(directory(name))
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    ours = predict(model, tokens(), torch.nn.functional.pad(tokens()[:, 1:], (0, 1), value=-100))
    ours.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    theirs = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    theirs.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, msg=key)
    balanced = name != "glm4_moe"  # which transformers gives no such loss
    assert ("load_balancing" in ours.aux_losses) == balanced
    if balanced:
        assert ours.aux_losses["load_balancing"].detach() > 0.5 * 2 * 0.9  # k at its smallest


@pytest.mark.parametrize("name", MIXTURES)
def test_choices_are_counted_as_they_are_made(name, directory):
    model, _ = load_as_it_is(directory(name))
    seen = []
    for block in model.model.layers:
        for part in block.modules():
            if type(part).__name__.endswith("Experts"):
                part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    stats = predict(model, tokens(), tokens()).ffn_stats
    assert len(stats) == 2
    for layer, chosen in zip(stats, seen, strict=True):
        assert layer["expert_counts"].tolist() == torch.bincount(chosen.flatten()).tolist()
        assert int(layer["tokens"]) == 26


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "granitemoe"])
def test_cost_is_what_torch_counts(name, directory):
    model = AutoModelForCausalLM.from_pretrained(
        directory(name), attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(16), use_cache=False)
    assert forward_flops_per_token(model, 17) * 34 == pytest.approx(counter.get_total_flops())
    total, active = count_parameters(model)
    experts = sum(p.numel() for p in stacked_experts(model).values())
    assert total - active == experts / 2


def test_activation_checkpointing_keeps_gradients(directory):
    losses, gradients = [], []
    for again in (False, True):
        module = LanguageModel(
            300, initialize_from=str(directory("mixtral")), activation_checkpointing=again
        )
        output = predict(module.model, tokens(), tokens())
        output.loss.backward()
        losses.append(output.loss)
        gradients.append([p.grad for p in module.model.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_is_trained_in_full(directory, tmp_path):
    model, _ = load_as_it_is(directory("mixtral"))
    model.bfloat16().save_pretrained(tmp_path / "half")
    module = LanguageModel(300, initialize_from=str(tmp_path / "half"))
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["mixtral", "carved"])
def test_a_run_resumes_exactly_and_can_be_used(name, directory, command, tmp_path, capsys):
    """With the directory's tokenizer, which nobody names; stopped after step 4."""
    run(command("whole", directory(name), sample_tokens=4))
    run(command("part", directory(name), **{"trainer.max_steps": 4}))
    run([*command("part", directory(name)), "--ckpt_path=last"])
    whole, part = (read_metrics(tmp_path / n / "metrics.csv") for n in ("whole", "part"))
    exact = ("step", "tokens", "train/loss", "train/grad_norm", "val/bits_per_byte")
    exact += ("train/aux/load_balancing", "experts/entropy/layer_00")
    assert [[row.get(k) for k in exact] for row in whole] == [
        [row.get(k) for k in exact] for row in part
    ]
    assert any("experts/entropy/layer_01" in row for row in whole)
    states = [
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for n in ("whole", "part")
    ]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key

    export(tmp_path / "whole" / "checkpoints" / "last.ckpt", tmp_path / "exported")
    assert_same_directories(tmp_path / "whole" / "model", tmp_path / "exported")
    model, tokenizer = load_any_with_tokenizer(tmp_path / "whole" / "model")
    assert tokenizer.fingerprint() == load_any_with_tokenizer(directory(name))[1].fingerprint()
    text = "the cat sat on a mat and the dog ran over the bread " * 3
    result = evaluate_text(model, tokenizer, text, sequence_length=16)
    start = evaluate_text(*load_any_with_tokenizer(directory(name)), text, sequence_length=16)
    assert result.bits_per_byte < start.bits_per_byte
    assert len((tmp_path / "whole" / "sample.txt").read_text())
    assert "resumed with other" not in capsys.readouterr().err


def test_evaluation_is_the_models_own_loss(directory):
    """One window, of a model that scales its logits."""
    model, tokenizer = load_any_with_tokenizer(directory("granitemoe"))
    model.config.logits_scaling = model.logits_scaling = 3.0
    text = "the cat sat on a mat"
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert evaluate_text(model, tokenizer, text).loss == pytest.approx(expected, rel=1e-5)


def test_other_vocabularies_are_refused(directory, command, copy_of, tmp_path):
    start = directory("mixtral")
    with pytest.raises(InputError, match=r"has 300 tokens, the data has 290; prepare .*--data.tok"):
        run(command("a", start, **{"data.tokenizer": other_tokenizer(tmp_path, 290)}))
    with pytest.raises(InputError, match="has another tokenizer than the data, of as many tokens"):
        run(command("b", start, **{"data.tokenizer": other_tokenizer(tmp_path, 300)}))
    assert not list(tmp_path.glob("[ab]/model"))


def other_tokenizer(folder, size):
    from moezoo_train.data.train_tokenizer import train_tokenizer

    words = (" ".join(f"{a}{b}" for b in "xyzuvw") for a in ("alpha", "beta", "gamma", "delta") * 9)
    train_tokenizer(words, folder / f"tokenizer{size}", size)
    return folder / f"tokenizer{size}"


def test_a_padded_vocabulary_is_no_mismatch(directory, tmp_path):
    model, tokenizer = load_as_it_is(directory("qwen3"))
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save(tmp_path / "padded")
    for size in (300, 320):
        assert LanguageModel(size, initialize_from=str(tmp_path / "padded")).model.vocab_size == 320
    with pytest.raises(InputError, match="has 300 tokens, the data has 310"):
        LanguageModel(310, initialize_from=str(tmp_path / "padded"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type: 'bloom' cannot be loaded; choose from: .*mixtral"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .*dequantise"),
        ({"num_local_experts": 5}, "the weights have [0-9,]+ elements, by config.json"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: 3, but no tensor of layer 2 is in"),
    ],
)
def test_foreign_directories_are_refused(change, message, copy_of):
    start = copy_of("mixtral")
    config = json.loads((start / "config.json").read_text()) | change
    (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"^initialize_from: .*({message})") as caught:
        LanguageModel(300, initialize_from=str(start))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(copy_of):
    start = copy_of("mixtral")
    (start / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match=r"initialize_from: .*model.safetensors is truncated"):
        LanguageModel(300, initialize_from=str(start))


def test_a_checkpoint_of_another_model_is_refused(directory, command, tmp_path):
    run(command("run", directory("mixtral"), **{"trainer.max_steps": 2}))
    other = command("run", directory("qwen2_moe"))
    with pytest.raises(InputError, match=r"ckpt_path: model\..* in the checkpoint, but"):
        run([*other, "--ckpt_path=last"])


def test_ours_stays_ours(directory):
    module = LanguageModel(300, initialize_from=str(directory("ours")))
    expected, _ = load_checkpoint(directory("ours"))
    assert re.fullmatch("MoezooForCausalLM", type(module.model).__name__)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, module.model.state_dict()[name]), name


def test_options_that_describe_another_model_are_named(directory, command, capsys):
    start, few = directory("mixtral"), {"trainer.max_steps": 1}
    run(command("same", start, **few))
    assert "not used" not in capsys.readouterr().err
    run(command("other", start, **few, **{"model.num_layers": 3, "model.ffn": "peer"}))
    said = f"model.initialize_from: {start} says what the model is; not used: num_layers, ffn\n"
    assert said in capsys.readouterr().err


def test_a_finished_run_says_that_nothing_was_left_to_train(directory, command, tmp_path, capsys):
    words = command("done", directory("llama"), **{"trainer.max_steps": 2})
    run(words)
    assert "nothing was trained" not in capsys.readouterr().err
    before = (tmp_path / "done" / "model" / "model.safetensors").read_bytes()
    run([*words, "--ckpt_path=last"])
    said = "nothing was trained, as the run has its 2 steps; a larger trainer.max_steps or "
    assert said in capsys.readouterr().err
    assert (tmp_path / "done" / "model" / "model.safetensors").read_bytes() == before
    run([*words, "--ckpt_path=last", "--trainer.max_steps=3"])
    assert "nothing was trained" not in capsys.readouterr().err
