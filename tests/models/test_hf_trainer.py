"""Training by transformers' Trainer: losses and state of the layers, step by step."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moezoo
from moezoo import InputError
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.hf_trainer import TrainingStateCallback

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; PEFT brings it")
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
WORDS, ACCUMULATED = 40, 2


def build() -> MoezooForCausalLM:
    """Return a mixture with a selection bias, and PEER, whose queries have a batch norm."""
    mixture = {
        "num_experts": 4,
        "d_expert": 8,
        "router": {"score": "sigmoid", "selection_bias": True, "bias_update_rate": 0.05},
        "balance": {"load_balancing": 0.5, "z_loss": 0.1},
    }
    peer = {"num_experts": 16, "num_heads": 2, "top_k": 2, "d_key": 8}
    config = MoezooConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn=[
            {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": mixture},
            {"layers": 1, "class_path": "moezoo.PEER", "init_args": peer},
        ],
    )
    return MoezooForCausalLM(config).double()


def train(kind: type[Trainer], model, folder, **options) -> list[torch.Tensor]:
    """Train three steps of two batches by SGD; return the batches in their order."""
    windows = torch.randint(WORDS, (24, 9))
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        **options,
    )
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    kind(
        model,
        arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[TrainingStateCallback()],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    ).train()
    return seen


def same(model, plain, tolerance: float = 1e-10) -> None:
    theirs = model.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_are_those_of_a_loop_by_hand(tmp_path, checkpointing):
    model = build()
    plain = copy.deepcopy(model).train()
    seen = train(Trainer, model, tmp_path, activation_checkpointing=checkpointing)
    assert len(seen) == 3 * ACCUMULATED
    layers = [block.mlp for block in plain.model.blocks()]
    for layer in layers:
        layer.defer_state()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in range(3):
        for batch in seen[step * ACCUMULATED : (step + 1) * ACCUMULATED]:
            output = plain(input_ids=batch, labels=batch)
            torch.testing.assert_close(output.aux_loss, sum(output.aux_losses.values()))
            assert output.aux_loss > 0.1
            ((output.lm_loss + output.aux_loss) / ACCUMULATED).backward()
            for layer, stats in zip(layers, output.ffn_stats, strict=True):
                layer.observe(stats)
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers:
            layer.step()
    (bias,) = (t for name, t in plain.state_dict().items() if name.endswith("selection_bias"))
    assert bias.abs().max() > 0.04  # it has moved
    same(model, plain)
    assert not any(layer._forward_hooks for layer in (b.mlp for b in model.model.blocks()))


def test_a_step_that_is_skipped_moves_nothing(tmp_path):
    model = build().train()
    callback, optimizer = TrainingStateCallback(), torch.optim.SGD(model.parameters(), lr=0.5)
    callback.on_train_begin(None, None, None, model=model)
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(WORDS, (2, 9))
    for skipped in (True, False):
        optimizer.step_was_skipped = skipped
        model(input_ids=tokens, labels=tokens).loss.backward()
        callback.on_pre_optimizer_step(None, None, None)
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        moved = [n for n, tensor in model.state_dict().items() if not tensor.equal(before[n])]
        assert bool(moved) is not skipped
    callback.on_train_end(None, None, None)
    after = copy.deepcopy(model.state_dict())
    model(input_ids=tokens, labels=tokens)
    callback.on_pre_optimizer_step(None, None, None)
    callback.on_optimizer_step(None, None, None, optimizer=optimizer)
    assert all(tensor.equal(after[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match=r"^model: Linear has no layer of moezoo; leave the callb"):
        TrainingStateCallback().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


def test_metrics_are_computed_of_logits_alone(tmp_path):
    model, windows = build(), torch.randint(WORDS, (6, 9))
    shapes = []

    def metrics(found):
        shapes.append((found.predictions.shape, found.label_ids.shape))
        return {}

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=4
    )
    rows = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=metrics)
    figures = trainer.evaluate()
    assert shapes == [((6, 9, WORDS), (6, 9))]
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss for w in (windows[:4], windows[4:])]
    expected = (4 * losses[0] + 2 * losses[1]) / 6
    assert figures["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def of_the_page(swapped) -> type[Trainer]:
    """Return the trainer that the page shows, for these layers."""
    text = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    (found,) = (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    names = {"Trainer": Trainer, "swapped": swapped}
    exec(compile(ast.Module([found], []), str(PAGE), "exec"), names)
    return names[found.name]


def test_the_trainer_of_the_page_adds_losses_of_swapped_layers_once(tmp_path):
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).double()
    balance = moezoo.BalanceOptions(load_balancing=0.5)
    swapped = moezoo.swap(model, lambda d: moezoo.SparseMoE(d, num_experts=4, balance=balance))
    plain = copy.deepcopy(model).train()
    seen = train(of_the_page(swapped), model, tmp_path)
    layers = [module for module in plain.modules() if isinstance(module, moezoo.SparseMoE)]
    outputs = {}
    for layer in layers:
        layer.register_forward_hook(lambda own, _, output: outputs.update({own: output}))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in range(3):
        for batch in seen[step * ACCUMULATED : (step + 1) * ACCUMULATED]:
            loss = plain(input_ids=batch, labels=batch).loss
            added = [sum(outputs[layer].losses.values()) for layer in layers]
            assert min(added) > 0.1
            ((loss + sum(added)) / ACCUMULATED).backward()
            for layer in layers:
                layer.observe(outputs[layer].stats)
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers:
            layer.step()
    same(model, plain, tolerance=1e-5)  # Llama's cross-entropy is in fp32
